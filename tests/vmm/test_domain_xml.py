"""The user of a domain, in XML that may say anything."""

from __future__ import annotations

import os
import pwd
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.vmm import domain_xml

# What libvirt 11.3 wrote of a running domain, shortened.
LIVE = """\
<domain type='kvm' id='1'>
  <name>web</name>
  <devices>
    <disk><source file='/x'><seclabel model='dac' relabel='yes'><label>+1:+1</label></seclabel>
    </source></disk>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'>
    <label>libvirt-11111111-2222-3333-4444-555555555555</label>
  </seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'>
    <label>+64055:+64056</label>
    <imagelabel>+64055:+64056</imagelabel>
  </seclabel>
</domain>
"""


def _labelled(label: str, more: str = "") -> str:
    return f"<domain><seclabel model='dac'><label>{label}</label>{more}</seclabel></domain>"


def test_it_is_the_label_of_the_domain_itself() -> None:
    assert domain_xml.user_id(LIVE) == 64055


@pytest.mark.parametrize(
    ("label", "uid"),
    [
        ("+0:+0", 0),
        ("+4711", 4711),
        ("4711:4711", 4711),
        ("\n +47&#49;1:kvm ", 4711),
        (f"{pwd.getpwuid(os.getuid()).pw_name}:users", os.getuid()),
    ],
)
def test_users_by_number_and_name(label: str, uid: int) -> None:
    assert domain_xml.user_id(_labelled(label)) == uid


@pytest.mark.parametrize(
    "xml",
    [
        "<domain/>",
        "<domain><seclabel model='dac' type='none'/></domain>",
        "<domain><seclabel><label>+1:+1</label></seclabel></domain>",
        "<x><domain><seclabel model='dac'><label>+1</label></seclabel></domain></x>",
        "<domain><seclabel model='dac'><x><label>+1</label></x></seclabel></domain>",
        "<domain><seclabel model='dac'/><seclabel model='x'><label>+1</label></seclabel></domain>",
    ],
)
def test_none_is_said(xml: str) -> None:
    assert domain_xml.user_id(xml) is None


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "nonsense",
        "<domain>",
        "<domain/><domain/>",
        "\ud800",
        "<domain>\0</domain>",
        "<!DOCTYPE x [<!ENTITY a '+0'>]>" + _labelled("&a;"),
        _labelled("+1", "<label>+2</label>"),
        *map(
            _labelled,
            ["", ":", "+", "++1", "-1", "+4294967296", "+1:+2:+3", "no such user", "+²", "+٣"],
        ),
        _labelled("nobody-has-this-name:kvm"),
        _labelled("+" + "9" * 100_000),
    ],
)
def test_what_cannot_be_read_is_refused(xml: str) -> None:
    with pytest.raises(ValueError, match=r"^it"):
        domain_xml.user_id(xml)


def test_much_of_it_takes_no_time() -> None:
    assert domain_xml.user_id("<domain>" + "<a>" * 10**5 + "</a>" * 10**5 + "</domain>") is None
    with pytest.raises(ValueError, match="security label"):
        domain_xml.user_id(_labelled("\n1" * 10**6))


@given(st.text() | st.text(st.sampled_from("<>/ domainseclb='+1&;:"), max_size=200))
def test_no_text_does_harm(text: str) -> None:
    for xml in (text, _labelled(text)):
        with suppress(ValueError):
            domain_xml.user_id(xml)
