"""The bare application that submits are held against: one route that inserts one row, as FastAPI's tutorial has it."""

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine, func
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from uuid6 import uuid7

from shared.settings import get_settings

PATH = "/rows"


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "bench_rows"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    name: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class RowRequest(BaseModel):
    name: str = "row"


class RowView(BaseModel):
    id: UUID
    name: str


def create_app() -> FastAPI:
    """The application; its table is made if it is not there."""
    engine = create_engine(get_settings().database_url, pool_size=8)
    Base.metadata.create_all(engine)
    app = FastAPI()

    def session() -> Iterator[Session]:
        with Session(engine, expire_on_commit=False) as opened:
            yield opened

    @app.post(PATH, status_code=201)
    def add(request: RowRequest, session: Annotated[Session, Depends(session)]) -> RowView:
        row = Row(name=request.name)
        session.add(row)
        session.commit()
        return RowView(id=row.id, name=row.name)

    return app
