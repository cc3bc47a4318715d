from __future__ import annotations

from pathlib import Path

import pytest

from idunno.base.errors import InvalidArgument
from idunno.node.config import CONFIG_FILE, NodeConfig, load_config, parse_address, save_config


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    config = NodeConfig(name="n1", listen="127.0.0.1:7400", zone='rack "7" \\ left', warm_runner=False, slots=3)
    save_config(tmp_path, config)
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = 'n1'", "listen must be set"),
        ("name = 'n1'\nlisten = '127.0.0.1:1'\ncolour = 'red'", "unknown field 'colour'"),
        ("name = 'n1'\nlisten = '127.0.0.1:1'\nslots = 'two'", "slots must be int"),
        ("name = 'n1'\nlisten = '127.0.0.1:1'\nslots = 0", "slots=0"),
        ("name = 'n1'\nlisten = '127.0.0.1'", "is no address"),
        ("name = 'n/1'\nlisten = '127.0.0.1:1'", "cannot name a node"),
        ("name = 'n1'\nlisten = '0.0.0.0:1'", "needs `advertise`"),
        ("name = 'n1'\nlisten = '127.0.0.1:1'\nscheduler_works = 'maybe'", "auto, always or never"),
        ("name = ", "Invalid value"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_field(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        load_config(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_addresses() -> None:
    assert parse_address("127.0.0.1:7400") == ("127.0.0.1", 7400)
    assert parse_address("[::1]:80") == ("::1", 80)
    for bad in ("", "host", "host:", ":80", "host:0", "host:65536", "a b:1", "::1:80", "http://x:1"):
        with pytest.raises(InvalidArgument):
            parse_address(bad)
