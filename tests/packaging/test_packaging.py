"""What an installer, a packager and a reader of the repository rely on."""

from __future__ import annotations

import importlib.resources
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "client" / "python" / "modelyard" / "v1"


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirement(name: str, lines: list[str]) -> Requirement:
    return next(found for line in lines if (found := Requirement(line)).name == name)


def floor(of: Requirement) -> Version:
    return Version(next(spec.version for spec in of.specifier if spec.operator in (">=", "==")))


def generated_versions(pattern: str, suffix: str) -> set[Version]:
    """Returns what `pattern` finds in every generated module with the suffix."""
    modules = sorted(STUBS.glob(f"*{suffix}"))
    assert modules, f"no stubs in {STUBS}: run `make dev`"
    found: set[Version] = set()
    for module in modules:
        match = re.search(pattern, module.read_text(encoding="utf-8"), re.DOTALL)
        assert match is not None, f"{module.name} does not say which version made it"
        found.add(Version(re.sub(r"[\s,]+", ".", match.group(1).strip(" ,\n"))))
    return found


def protobuf_gencode() -> Version:
    found = generated_versions(
        r"ValidateProtobufRuntimeVersion\(\s*_runtime_version\.Domain\.PUBLIC,([\d,\s]+),\s*''",
        "_pb2.py",
    )
    assert len(found) == 1, f"stubs of several generations lie side by side: {found}"
    return found.pop()


def test_the_declared_protobuf_range_is_what_the_stubs_accept() -> None:
    declared = requirement("protobuf", read_project()["project"]["dependencies"])
    gencode = protobuf_gencode()
    assert floor(declared) >= gencode
    # A runtime refuses code older than the previous major version.
    assert Version(f"{gencode.major + 1}.99") in declared.specifier
    assert Version(f"{gencode.major + 2}.0") not in declared.specifier


def test_the_declared_grpcio_floor_is_what_the_stubs_accept() -> None:
    project = read_project()
    declared = requirement("grpcio", project["project"]["dependencies"])
    tools = requirement("grpcio-tools", project["build-system"]["requires"])
    made_by = generated_versions(r"GRPC_GENERATED_VERSION = '([\d.]+)'", "_pb2_grpc.py")
    assert made_by == {floor(tools)}, "the stubs are stale: run `make dev`"
    assert floor(declared) >= max(made_by)


def test_the_build_requirements_are_also_in_the_dev_extra() -> None:
    project = read_project()
    build = {str(Requirement(line)) for line in project["build-system"]["requires"]}
    dev = {str(Requirement(line)) for line in project["project"]["optional-dependencies"]["dev"]}
    assert build <= dev


def test_the_installed_version_is_the_one_in_pyproject() -> None:
    assert version("modelyard") == read_project()["project"]["version"]


def test_importing_the_client_pulls_in_no_framework_and_no_server() -> None:
    program = (
        "import sys, modelyard\n"
        "heavy = {'torch', 'transformers', 'modelyard_server'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("modelyard", "py.typed"),
        ("modelyard_server", "py.typed"),
        ("modelyard_server", "_core.pyi"),
    ],
)
def test_type_information_is_installed(package: str, file: str) -> None:
    assert importlib.resources.files(package).joinpath(file).is_file()


def test_the_descriptors_of_the_foreign_protocol_are_installed() -> None:
    folder = importlib.resources.files("modelyard_server").joinpath("services", "oip")
    assert folder.joinpath("inference.binpb").is_file(), "run `make dev`"


def test_no_stubs_of_the_foreign_protocol_are_installed() -> None:
    # They would clash with those of any client of it in the same process.
    assert not list((ROOT / "client" / "python").glob("inference*"))
    assert not list((ROOT / "server").rglob("grpc_service_pb2*"))


def test_the_demo_text_is_installed() -> None:
    data = importlib.resources.files("modelyard_server").joinpath("demo", "data")
    assert [entry.name for entry in data.iterdir() if entry.name.endswith(".tsv")]


def test_every_folder_with_modules_is_a_package() -> None:
    # Without an __init__.py a folder is importable in an editable install and absent from a wheel.
    roots = [ROOT / "client" / "python" / "modelyard", ROOT / "server" / "modelyard_server"]
    folders = {module.parent for root in roots for module in root.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def copy_of_the_checkout(to: Path) -> Path:
    """Copies what git tracks or would track: the tree as a fresh clone has it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (source := ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to / name)
    return to


def test_the_sdist_holds_everything_a_build_needs(tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    # A stub left beside the sources by an editable install must not travel.
    stray = checkout / STUBS.relative_to(ROOT) / "stray_pb2.py"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.touch()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path / "dist")],
        cwd=checkout,
        capture_output=True,
        check=True,
    )
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        held = {Path(*Path(name).parts[1:]).as_posix() for name in content.getnames()}
    wanted = {
        path.relative_to(checkout).as_posix()
        for folder in ("proto", "csrc", "client/python/modelyard", "server/modelyard_server")
        for path in (checkout / folder).rglob("*")
        if path.suffix in {".proto", ".cpp", ".hpp", ".py", ".pyi", ".tsv", ".typed"}
        and path != stray
    } | {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"}
    assert wanted <= held, f"missing from the sdist: {sorted(wanted - held)}"
    assert not [name for name in held if re.search(r"_pb2(_grpc)?\.pyi?$|\.so$", name)]


def check_tracked(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "tools" / "check_tracked.sh")],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_generated_and_no_package_index_is_tracked() -> None:
    done = check_tracked(ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("client/python/modelyard/v1/device_pb2.py", ""),
        ("server/modelyard_server/_core.cpython-311-x86_64-linux-gnu.so", ""),
        ("server/modelyard_server/services/oip/inference.binpb", ""),
        ("model.safetensors", ""),
        ("requirements.txt", "--extra-index-url " + "https:" + "//example.test/simple\n"),
        ("docs/install.md", "Get it from " + "py" + "pi.org.\n"),
    ],
)
def test_the_check_of_tracked_files_catches(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content, encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "--force", "."], cwd=tmp_path, check=True)
    done = check_tracked(tmp_path)
    assert done.returncode == 1
    assert name in done.stderr
