"""What the Llama 4 licence asks to lie beside derived weights: its text, a NOTICE, a name that begins with Llama."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from converters.origin import Origin
from l4tool.core import licence
from l4tool.core.console import note
from l4tool.core.errors import InputMissing, UsageError

LICENCE, NOTICE, POLICY = "LICENSE", "NOTICE", "USE_POLICY"


def missing(origin: Origin, names: Collection[str]) -> list[str]:
    """What a Llama derivative must or should carry and an output with these side files does not."""
    kinds = (LICENCE, POLICY) if origin.is_llama else ()
    return [kind for kind in kinds if not any(name.startswith(kind) for name in names)]


def tell(origin: Origin, names: Collection[str], out: Path, suggestion: str, where: str, is_folder: bool) -> None:
    """Say beforehand what the licence asks for and this output would lack. `where` is the source, for people."""
    if LICENCE in missing(origin, names):
        first = f", or first `l4tool fetch {origin.repo or 'REPO'} --include 'LICENSE*' -o {where}`"
        note(f"{where} has no LICENSE, which every copy must carry: add --license FILE{first if is_folder else ''}")
    if origin.is_llama and not out.name.startswith(licence.NAME_PREFIX):
        note(f'published, its name must begin with "{licence.NAME_PREFIX}": not {out.name} but {suggestion}, say')


def notice(old: bytes) -> bytes:
    """A NOTICE with the licence's line in it: the source's own (empty where it has none), extended where need be."""
    if licence.NOTICE in " ".join(old.decode(errors="replace").split()):
        return old
    return old.rstrip() + (b"\n\n" if old.strip() else b"") + f"{licence.NOTICE}\n".encode()


def read_licence(path: Path, is_llama: bool) -> bytes:
    """The file of --license. Raises InputMissing, or UsageError where it is not the licence of these weights."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror}", hint="--license takes a file") from None
    if is_llama and not licence.is_licence_text(data.decode(errors="replace")):
        raise UsageError(
            f"{path} is not the {licence.NAME}, which these weights are under", hint=f"get it at {licence.LICENCE_URL}"
        )
    return data


def facts(origin: Origin, names: Collection[str]) -> dict[str, object]:
    """The licence as a report states it."""
    return {
        "name": origin.licence_name,
        "base_model": origin.repo or origin.name,
        "commit": origin.commit,
        "notice": licence.NOTICE if origin.is_llama else None,
        "missing": missing(origin, names),
    }
