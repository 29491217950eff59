from __future__ import annotations

import re
from pathlib import Path

import pytest

WIREGUARD = Path(__file__).parent.parent / "deploy" / "wireguard"
SITES = "abc"


def sections(site: str) -> list[tuple[str, dict[str, str]]]:
    text = (WIREGUARD / f"site-{site}.conf").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: list[tuple[str, dict[str, str]]] = []
    for line in lines:
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            found.append((heading[1], {}))
        else:
            key, value = line.split(" = ")
            found[-1][1][key] = value
    return found


@pytest.mark.parametrize("site", SITES)
def test_each_site_lets_in_the_others_and_each_at_its_own_address(site: str) -> None:
    (kind, own), *peers = sections(site)
    assert kind == "Interface"
    assert own["PrivateKey"] == f"PRIVATE_KEY_OF_{site.upper()}"
    others = [other for other in SITES if other != site]
    assert [kind for kind, _ in peers] == ["Peer"] * len(others)
    for (_, peer), other in zip(peers, others, strict=True):
        _, theirs = sections(other)[0]
        assert peer["PublicKey"] == f"PUBLIC_KEY_OF_{other.upper()}"
        assert peer["Endpoint"] == f"ADDRESS_OF_{other.upper()}:{theirs['ListenPort']}"
        assert peer["AllowedIPs"] == theirs["Address"].replace("/24", "/32")
