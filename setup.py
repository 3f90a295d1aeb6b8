"""Build steps that pyproject.toml cannot express: protobuf stubs and the C++ core.

Both are ordinary setuptools commands, so `pip install .`, `pip install -e .`, an sdist and
`python setup.py build_protos --inplace` share one implementation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import which

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PROTO_ROOT = ROOT / "proto"
STUB_ROOT = ROOT / "client" / "python"
# What stubs are made of. The protocol under proto/inference is not ours: a program may have stubs
# of it from elsewhere, and two of them in one process clash. The server has its descriptors in a
# file.
STUB_PROTOS = PROTO_ROOT / "modelyard"
FOREIGN_PROTOS = PROTO_ROOT / "inference"
SERVER_ROOT = ROOT / "server"
FOREIGN_DESCRIPTORS = Path("modelyard_server") / "services" / "oip" / "inference.binpb"
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def find_tool(name: str, package: str) -> str:
    """Returns the path of the program `name` that the installed distribution `package` brought.

    Asking the distribution comes first because it alone is right everywhere: an isolated build
    has its tools in a temporary prefix, a build without isolation has them beside a Python that
    may not be on PATH, and a system copy on PATH may be too old. A program from elsewhere
    (beside the interpreter, then PATH) will do when the distribution is not there.

    Raises:
        SystemExit: the program is nowhere to be found.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == name and file.parent.name in ("bin", "Scripts"):
            path = Path(str(file.locate())).resolve()
            if path.exists():
                return str(path)
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = which(name, path=os.pathsep.join(places))
    if found is None:
        raise SystemExit(f"{name} was not found: install it with `pip install {package}`")
    return found


class BuildProtos(Command):
    """Generates the `*_pb2*` modules from proto/ (a PEP 660 aware part of `build`)."""

    description = "generate protobuf and gRPC stubs"
    user_options = [
        ("inplace", "i", "write the stubs beside the sources, as an editable install does"),
    ]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        """Declares the options."""
        self.build_lib: str | None = None
        self.inplace = False

    def finalize_options(self) -> None:
        """Takes the output directory from `build_py`."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Writes the stubs and removes those whose .proto file is gone."""
        # Imported late: the metadata of the project is read without any build requirement.
        import grpc_tools
        from grpc_tools import protoc

        out = STUB_ROOT if self.editable_mode or self.inplace else self._build_lib()
        out.mkdir(parents=True, exist_ok=True)
        wanted = {out / path for path in self._stubs()}
        for top in {proto.parts[0] for proto in _protos(STUB_PROTOS)}:
            for stub in (out / top).rglob("*_pb2*"):
                if stub.name.endswith(STUB_SUFFIXES) and stub not in wanted:
                    stub.unlink()
        well_known = Path(grpc_tools.__file__).parent / "_proto"
        plugins = [
            f"--plugin={name}={find_tool(name, 'mypy-protobuf')}"
            for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
        ]
        arguments = [
            "protoc",
            *plugins,
            f"-I{PROTO_ROOT}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--mypy_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out={out}",
            *map(str, _protos(STUB_PROTOS)),
        ]
        descriptors = self._descriptors()
        descriptors.parent.mkdir(parents=True, exist_ok=True)
        foreign = [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"--descriptor_set_out={descriptors}",
            "--include_imports",
            *map(str, _protos(FOREIGN_PROTOS)),
        ]
        if protoc.main(arguments) != 0 or protoc.main(foreign) != 0:
            raise SystemExit("protoc failed: its messages above name the file and line in proto/")

    def get_outputs(self) -> list[str]:
        """Lists the stubs and descriptors where a regular build puts them."""
        return [str(self._build_lib() / path) for path in (*self._stubs(), FOREIGN_DESCRIPTORS)]

    def get_output_mapping(self) -> dict[str, str]:
        """Maps each output of an editable build to the file beside the sources it stands for."""
        if not self.editable_mode:
            return {}
        places = {path: STUB_ROOT / path for path in self._stubs()}
        places[FOREIGN_DESCRIPTORS] = SERVER_ROOT / FOREIGN_DESCRIPTORS
        return {str(self._build_lib() / path): str(place) for path, place in places.items()}

    def get_source_files(self) -> list[str]:
        """Lists the .proto files, relative to the root, for the sdist."""
        return [str(Path("proto") / path) for path in _protos(PROTO_ROOT)]

    def _build_lib(self) -> Path:
        assert self.build_lib is not None, "finalize_options comes first"
        return Path(self.build_lib)

    def _descriptors(self) -> Path:
        beside_sources = self.editable_mode or self.inplace
        return (SERVER_ROOT if beside_sources else self._build_lib()) / FOREIGN_DESCRIPTORS

    def _stubs(self) -> list[Path]:
        protos = _protos(STUB_PROTOS)
        return [p.with_name(p.stem + suffix) for p in protos for suffix in STUB_SUFFIXES]


def _protos(folder: Path) -> list[Path]:
    """The .proto files below a folder, relative to where imports are."""
    return sorted(path.relative_to(PROTO_ROOT) for path in folder.rglob("*.proto"))


class CMakeBuildExt(build_ext):
    """Builds `modelyard_server._core` with the project's own CMakeLists.txt.

    The build directory is fixed, so a second build compiles only what changed. Everything that
    an isolated build environment moves (cmake, ninja, pybind11, Python) is passed on each
    configure, or CMake would remember paths of an environment that no longer exists.

    Environment: MODELYARD_BUILD_TYPE (default Release); MODELYARD_WERROR=ON turns warnings into
    errors (default OFF here: somebody's newer compiler must not break an install).
    """

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds the one extension.

        Raises:
            SystemExit: CMake failed, or did not produce the module where it is wanted.
        """
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake", "cmake")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'ninja')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('MODELYARD_BUILD_TYPE', 'Release')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMODELYARD_WERROR={os.environ.get('MODELYARD_WERROR', 'OFF')}",
            "-DMODELYARD_BUILD_PYTHON=ON",
        ]
        for command in (configure, [cmake, "--build", str(build_dir), "--target", "_core"]):
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(f"the C++ core was not built; what failed: {' '.join(command)}")
        if not target.exists():
            raise SystemExit(f"CMake reported success but {target} is not there")


class Build(build):
    """`build` with the stubs as one more part."""

    sub_commands = [*build.sub_commands, ("build_protos", None)]


setup(
    cmdclass={"build": Build, "build_protos": BuildProtos, "build_ext": CMakeBuildExt},
    # The sources are CMakeLists.txt's business; setuptools only needs to know the module's name.
    ext_modules=[Extension("modelyard_server._core", sources=[])],
)
