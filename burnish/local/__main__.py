"""`python -m burnish.local` is `burnish local`."""

from burnish.local.commands import local

local(prog_name="burnish local")
