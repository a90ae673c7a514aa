"""The protos are clean, and the code beside them is what they generate."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"
BIN = Path(sys.executable).parent


def test_generated_code_has_not_drifted(tmp_path: Path) -> None:
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    assert len(sources) == 5
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOS}",
            f"--plugin=protoc-gen-mypy={BIN / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}",
            f"--python_out={tmp_path}",
            f"--grpc_python_out={tmp_path}",
            f"--mypy_out=quiet:{tmp_path}",
            f"--mypy_grpc_out=quiet:{tmp_path}",
            *sources,
        ],
        check=True,
        cwd=PROTOS,
    )
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    kept = {
        path.relative_to(PROTOS): path.read_text()
        for path in PROTOS.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert made == kept, "run `make gen`"


def test_protos_pass_the_standard_lint_and_are_documented_per_field() -> None:
    buf = BIN / "buf"
    assert buf.exists() or shutil.which("buf")
    for arguments in (["lint"], ["format", "--diff", "--exit-code"]):
        result = subprocess.run([buf, *arguments], cwd=PROTOS, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
