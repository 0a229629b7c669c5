"""The stages: one module a kind, loaded when a recipe names it.

A stage is its words and its deed. The words are a class in shared/recipe.py (with `kind`, what it consumes and what it
produces) and its name in the union `Stage`; the deed is the module of that name here, which has

    run(stage: <its class>, model: Model, ctx: StageContext) -> StageResult

It reads `model`, writes into `ctx.directory` and returns the new model. It tells `ctx.progress` often, for that is
where it can be interrupted. Everything random takes `ctx.seed`; the same inputs give the same bytes, and these are
taken from the cache the next time. So `ctx.recipe` ends with the stage itself, unless its words say that it
`looks_ahead`. Where the model, the data or the recipe is at fault it raises StageFailed with a sentence for the
customer; anything else that it raises is a bug. It knows no database, no queue and no other stage.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def load(kind: str) -> ModuleType:
    """The module of a stage kind: the one place where the workshop reaches a heavy library by name."""
    return importlib.import_module(f"worker.stages.{kind}")
