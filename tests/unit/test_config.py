"""Settings: precedence of their sources, and every refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import SettingsError, load_settings, setting, settings_from_command_line


@dataclass(frozen=True)
class Settings:
    port: int = setting(50052, help="TCP port", minimum=0, maximum=65535)
    drain_s: float = setting(30.0, help="longest drain, 100 % of streams", minimum=0.5)
    cap: int = setting(9, help="upper bound only", maximum=9)
    host: str = setting("127.0.0.1", help="address")
    log_level: str = setting("info", help="verbosity", choices=("debug", "info"))
    prefix_cache: bool = setting(True, help="keep pages")
    trace_file: Path | None = setting(None, help="spans go here")
    seed: int | None = setting(None, help="fixed seed", minimum=0)
    peers: tuple[str, ...] = setting((), help="others")
    stages: tuple[str, ...] = setting(("a",), help="some", choices=("a", "b"))


def load(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    return load_settings(Settings, argv, environ or {}, "quire decode")


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "quire.toml"
    path.write_text(text)
    return str(path)


def test_without_any_source_the_defaults_hold() -> None:
    assert load() == Settings()


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    config = toml(tmp_path, 'port = 1\ndrain_s = 1\nhost = "file"\n')
    environ = {"QUIRE_PORT": "2", "QUIRE_DRAIN_S": "2.5"}
    loaded = load(["--config", config, "--port", "3"], environ)
    assert (loaded.port, loaded.drain_s, loaded.host, loaded.cap) == (3, 2.5, "file", 9)


def test_flag_names_another_file_than_the_environment(tmp_path: Path) -> None:
    config = toml(tmp_path, "port = 4")
    assert load(environ={"QUIRE_CONFIG": config}).port == 4
    assert load(["--config", config], {"QUIRE_CONFIG": "/nowhere"}).port == 4


def test_every_type_is_read_from_text() -> None:
    argv = ["--no-prefix-cache", "--trace-file", "t.jsonl", "--peers", "a:1, b:2", "--seed=5"]
    loaded = load([*argv, "--stages", "a,b", "--log-level", "debug"])
    assert loaded.prefix_cache is False
    assert loaded.trace_file == Path("t.jsonl")
    assert loaded.peers == ("a:1", "b:2")
    assert loaded.stages == ("a", "b")
    assert (loaded.seed, loaded.log_level) == (5, "debug")


def test_every_type_is_read_from_toml(tmp_path: Path) -> None:
    text = 'prefix_cache = false\ntrace_file = "t"\npeers = ["a", "b"]\ndrain_s = 2\nseed = 1'
    loaded = load(["--config", toml(tmp_path, text)])
    assert loaded == Settings(
        prefix_cache=False, trace_file=Path("t"), peers=("a", "b"), drain_s=2.0, seed=1
    )


@pytest.mark.parametrize("text", ["true", "1", "Yes", "ON"])
def test_environment_switches_a_bool_on(text: str) -> None:
    assert load(environ={"QUIRE_PREFIX_CACHE": text}).prefix_cache is True


@pytest.mark.parametrize("text", ["false", "0", "No", "OFF"])
def test_environment_switches_a_bool_off(text: str) -> None:
    assert load(environ={"QUIRE_PREFIX_CACHE": text}).prefix_cache is False


def test_empty_text_means_none_where_none_is_allowed() -> None:
    loaded = load(environ={"QUIRE_TRACE_FILE": "", "QUIRE_SEED": "", "QUIRE_PEERS": ""})
    assert (loaded.trace_file, loaded.seed, loaded.peers) == (None, None, ())


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("PORT", "65536", "an integer from 0 to 65535"),
        ("PORT", "-1", "an integer from 0 to 65535"),
        ("PORT", "many", "an integer from 0 to 65535"),
        ("PORT", "1.5", "an integer from 0 to 65535"),
        ("PORT", "", "an integer from 0 to 65535"),
        ("DRAIN_S", "0.4", "a number of at least 0.5"),
        ("DRAIN_S", "nan", "a number of at least 0.5"),
        ("DRAIN_S", "inf", "a number of at least 0.5"),
        ("CAP", "10", "an integer of at most 9"),
        ("LOG_LEVEL", "loud", "debug, info"),
        ("PREFIX_CACHE", "maybe", "true or false"),
        ("STAGES", "a,c", "any of a, b"),
        ("SEED", "-1", "an integer of at least 0"),
    ],
)
def test_bad_value_is_refused_with_field_value_source_and_range(
    variable: str, text: str, allowed: str
) -> None:
    with pytest.raises(SettingsError) as refusal:
        load(environ={f"QUIRE_{variable}": text})
    expected = f"{variable.lower()}: {text!r} from environment QUIRE_{variable}; allowed: {allowed}"
    assert str(refusal.value) == expected


@pytest.mark.parametrize(
    "line",
    ["port = true", 'port = "x"', "port = 1.5", "host = 3", "prefix_cache = 1", "drain_s = true",
     "peers = [1]", 'trace_file = ["a"]', "port = {a = 1}"],
)  # fmt: skip
def test_wrong_type_in_the_file_is_refused(tmp_path: Path, line: str) -> None:
    config = toml(tmp_path, line)
    with pytest.raises(SettingsError, match=rf"{line.split(' ')[0]}: .* from file {config};"):
        load(["--config", config])


def test_bad_value_of_a_flag_names_the_flag() -> None:
    with pytest.raises(SettingsError, match=r"^drain_s: 'soon' from flag --drain-s; allowed: "):
        load(["--drain-s", "soon"])


def test_unknown_key_of_the_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^prot: unknown key .*; did you mean port\?$"):
        load(["--config", toml(tmp_path, "prot = 1")])


@pytest.mark.parametrize("argv", [["--prot", "1"], ["--por", "1"], ["stray"], ["--port"]])
def test_unknown_or_incomplete_flag_is_refused(argv: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"--po?r|stray"):
        load(argv)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^config: cannot read .*: No such file"):
        load(["--config", str(tmp_path / "missing.toml")])


def test_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^config: .* is not TOML: "):
        load(["--config", toml(tmp_path, "port 1")])


def test_variables_of_other_programs_are_ignored() -> None:
    assert load(environ={"QUIRE_STATE_DIR": "/x", "QUIRE_ANOTHER": "1"}) == Settings()


def test_command_line_exits_with_code_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["decode", "--port", "70000"])
    with pytest.raises(SystemExit) as stop:
        settings_from_command_line(Settings, "quire decode")
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "quire decode: port: '70000' from flag --port; allowed: an integer from 0 to 65535\n"
    )


def test_help_lists_every_field_with_default_range_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in (
        "an integer from 0 to 65535; default 50052 [QUIRE_PORT]",
        "longest drain, 100 % of streams",
        "--no-prefix-cache",
        "true or false; default true [QUIRE_PREFIX_CACHE]",
        "a path; default none [QUIRE_TRACE_FILE]",
        "texts separated by commas; default empty [QUIRE_PEERS]",
        "debug, info; default info [QUIRE_LOG_LEVEL]",
        "[QUIRE_CONFIG]",
    ):
        assert text in shown
