"""[server] and [http]: how the server is reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.config_problems import CPU, only_problem

from modelyard_server.config import HttpConfig, parse_config


class TestServer:
    @pytest.mark.parametrize(
        "listen",
        ["127.0.0.1:1", "127.9.9.9:0", "localhost:65535", "[::1]:1", "[::ffff:127.0.0.1]:1"],
    )
    def test_loopback_addresses_are_taken(self, base: Path, listen: str) -> None:
        config = parse_config(f'[server]\nlisten = "{listen}"\n{CPU}', base=base)
        assert config.server.listen == listen

    @pytest.mark.parametrize(
        "listen", ["0.0.0.0:1", "[::]:1", "192.168.0.1:1", "example.com:1", "[::ffff:8.8.8.8]:1"]
    )
    def test_other_addresses_need_a_word_of_consent(self, base: Path, listen: str) -> None:
        text = f'[server]\nlisten = "{listen}"\n'
        line, key, problem = only_problem(text + CPU, base)
        assert (line, key) == (2, "server.listen")
        assert "no TLS yet" in problem
        assert "insecure_non_loopback" in problem
        config = parse_config(f"{text}insecure_non_loopback = true\n{CPU}", base=base)
        assert config.server.listen == listen

    @pytest.mark.parametrize(
        "listen",
        [
            "",
            ":8470",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:65536",
            "127.0.0.1:-1",
            "127.0.0.1:٣",
            "127.0.0.1: 1",
            "127.1:1",
            "256.0.0.1:1",
            "::1:8470",
            "[::1:8470",
            "[127.0.0.1]:1",
            "[]:1",
            "unix:/tmp/x",
            "http://127.0.0.1:1",
            "a b:1",
            "-a:1",
        ],
    )
    def test_what_is_no_address_is_refused(self, base: Path, listen: str) -> None:
        line, key, _ = only_problem(f"[server]\nlisten = '{listen}'\n{CPU}", base)
        assert (line, key) == (2, "server.listen")

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ("default_deadline_s = 0", "0.001 to 86400"),
            ("default_deadline_s = -1", "0.001 to 86400"),
            ("default_deadline_s = nan", "0.001 to 86400"),
            ("default_deadline_s = inf", "0.001 to 86400"),
            ("default_deadline_s = 301", "must not be above max_deadline_s"),
            ('default_deadline_s = "30"', "a number of seconds"),
            ("default_deadline_s = true", "a number of seconds"),
            (f"max_deadline_s = 0x{'f' * 9000}", "far out of range"),
            ('max_message_bytes = "1KiB"', "64KiB to"),
            ('max_message_bytes = "2GiB"', "64KiB to"),
            ("max_message_bytes = 1.5", "a size"),
            ("max_message_bytes = -1", "0 to"),
            ('max_message_bytes = "16"', "no unit"),
            ('max_message_bytes = "16mb"', "write 'MB'"),
            ("shutdown_grace_s = -0.1", "0 to 3600"),
            ('log_level = "INFO"', "must be one of debug, info"),
            ("log_level = 1", "must be a string, got an integer"),
            ("insecure_non_loopback = 1", "must be true or false"),
        ],
    )
    def test_values_out_of_range_are_refused(self, base: Path, setting: str, text: str) -> None:
        line, key, problem = only_problem(f"[server]\n{setting}\n{CPU}", base)
        assert (line, key) == (2, f"server.{setting.split()[0]}")
        assert text in problem


class TestHttp:
    def test_it_is_off_unless_it_is_asked_for(self, base: Path) -> None:
        assert parse_config(CPU, base=base).http == HttpConfig()
        assert HttpConfig().host == ""

    @pytest.mark.parametrize("listen", ["127.0.0.1:8081", "localhost:0", "[::1]:1"])
    def test_loopback_addresses_are_taken(self, base: Path, listen: str) -> None:
        config = parse_config(f'[http]\nlisten = "{listen}"\n{CPU}', base=base)
        assert config.http.listen == listen
        assert config.http.host == listen.rpartition(":")[0].strip("[]")

    @pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "example.com:1"])
    def test_other_addresses_need_a_word_of_consent(self, base: Path, listen: str) -> None:
        text = f'[http]\nlisten = "{listen}"\n'
        line, key, problem = only_problem(text + CPU, base)
        assert (line, key) == (2, "http.listen")
        assert "insecure_non_loopback" in problem
        config = parse_config(f"{text}insecure_non_loopback = true\n{CPU}", base=base)
        assert config.http.listen == listen

    def test_no_address_is_no_exposure(self, base: Path) -> None:
        text = f"[http]\ninsecure_non_loopback = true\n{CPU}"
        assert parse_config(text, base=base).http.listen == ""

    @pytest.mark.parametrize(
        "origin",
        ["*", "example.com", "https://example.com/", "HTTPS://x", "null", "http://a:123456"],
    )
    def test_origins_are_those_of_browsers(self, base: Path, origin: str) -> None:
        good = '"https://example.com", "http://localhost:3000", "http://[::1]:80"'
        text = f"[http]\norigins = [{good}"
        assert len(parse_config(f"{text}]\n{CPU}", base=base).http.origins) == 3
        line, key, problem = only_problem(f'{text}, "{origin}"]\n{CPU}', base)
        assert (line, key) == (2, "http.origins[3]")
        assert "must be an origin as a browser writes it" in problem
