"""Known ways around a check of URLs, as a table: each is refused, whatever a lenient resolver would make of it."""

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.schema import LineError
from batch.url_images import UrlFetcher
from batch.web_addresses import HostRule, UrlPolicy, is_public, parse_address, parse_url
from l4tool.core.errors import UsageError

# Refused by their spelling alone: no name is looked up.
SPELLINGS = [
    # loopback and metadata in every notation of inet_aton
    "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/", "http://0x7F.1/", "http://0177.0.0.1/",
    "http://017700000001/", "http://0177.1/", "http://127.1/", "http://127.0.1/", "http://127.0.0.01/",
    "http://0127.0.0.1/", "http://00000177.0.0.1/", "http://0/", "http://0x0/", "http://1/", "http://2852039166/",
    "http://0xa9fea9fe/", "http://0xA9.0xFE.0xA9.0xFE/", "http://0251.0376.0251.0376/", "http://169.254.43518/",
    "http://425.510.425.510/", "http://999.999.999.999/", "http://256.0.0.1/", "http://127.0.0.1.1/",
    "http://4294967296/", "http://0x100007f000001/", "http://09/", "http://0x/",
    # dots and empty labels
    "http://127.0.0.1./", "http://localhost./", "http://example.com./", "http://.example.com/", "http://a..b/",
    "http://./", "http:///etc/passwd", "http://", "http://?x", "http://#x", "http://:80/", "http://[]/",
    # Unicode digits, dots and letters
    "http://①②⑦.⓪.⓪.①/", "http://127。0。0。1/", "http://127．0．0．1/", "http://１２７.0.0.1/", "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
    "http://exämple.com/", "http://loc\u00adalhost/", "http://local\u200bhost/", "http://example.com\u2044@127.0.0.1/",
    # who is the host?
    "http://example.com@127.0.0.1/", "http://127.0.0.1@example.com/", "http://a:b@example.com/", "http://@example.com/",
    "http://example.com:80@127.0.0.1/", "http://example.com\\@127.0.0.1/", "http://127.0.0.1\\.example.com/",
    "http:\\\\127.0.0.1/", "http:/\\127.0.0.1/", "http://example.com%2f@127.0.0.1/", "http://127.0.0.1%00.example.com/",
    "http://127.0.0.1%2eexample.com/", "http://%31%32%37.0.0.1/", "http://exa mple.com/", "http://example.com\t/",
    "http://example.com\n/", "http://example.com/\r\nHost: x", "http://exam\x00ple.com/", " http://example.com/",
    "http:example.com", "http:/example.com", "https:127.0.0.1", "http://example.com,127.0.0.1/", "http://a;b/", "http://a&b/",
    "http://a_!b/", "http://(x)/", "http://'x'/", "http://<x>/", "http://-a.com/", "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 130 + "com/", "http://example.com/" + "a" * 20_000,
    # ports and schemes
    "http://example.com:0/", "http://example.com:99999/", "http://example.com:/", "http://example.com:80:80/",
    "http://example.com:8 0/", "http://example.com:+80/", "http://example.com:0x50/", "http://example.com:٨٠/",
    "http://example.com:22/", "http://example.com:6379/", "https://example.com:8443/", "http://example.com:25/",
    "ftp://example.com/", "gopher://example.com/", "file:///etc/passwd", "dict://example.com/", "httpx://example.com/",
    "//example.com/", "javascript:alert(1)", "unix:///var/run/docker.sock", "jar:http://example.com!/",
    # brackets
    "http://[::1%25lo]/", "http://[fe80::1%eth0]/", "http://[fe80::1%25eth0]/", "http://[::1/", "http://::1/",
    "http://[127.0.0.1]/", "http://[::ffff:127.1]/", "http://[1::2::3]/", "http://[::1]x/", "http://[v1.a]/",
]  # fmt: skip

# Refused by the address, written or found by the resolver.
ADDRESSES = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1",
    "127.255.255.254", "168.63.129.16", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255",
    "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:a9fe:a9fe", "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:2::1",
    "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2002:808:808::", "3fff::1",
    "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fd12:3456::1", "fe80::1", "febf::1", "fec0::1", "ff02::1",
    "ff0e::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "172.15.0.1", "172.32.0.1", "100.63.255.255", "100.128.0.1",
          "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "2001:4860:4860::8888"]  # fmt: skip


def never(host, port):
    raise AssertionError(f"{host} was looked up")


@pytest.mark.parametrize("url", SPELLINGS)
def test_bad_spellings_are_refused_before_any_lookup(url):
    with pytest.raises(LineError) as caught:
        UrlFetcher(UrlPolicy(), resolve=never).fetch(url)
    assert caught.value.code == "url_not_allowed"


def test_the_tables_are_long():
    assert len(set(SPELLINGS)) >= 100 and len(set(ADDRESSES)) >= 50


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("others", [[], ["8.8.8.8"]])
def test_a_name_with_one_bad_address_is_refused(address, others, no_connections):
    fetcher = UrlFetcher(UrlPolicy(), resolve=lambda host, port: [*others, address])
    with pytest.raises(LineError, match="not a public address") as caught:
        fetcher.fetch("http://pictures.example.com/x.png")
    assert caught.value.code == "url_not_allowed"


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_bad_address_itself_is_refused(address, no_connections):
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(LineError) as caught:
        UrlFetcher(UrlPolicy(), resolve=never).fetch(f"https://{host}/x.png")
    assert caught.value.code == "url_not_allowed"


@pytest.fixture
def no_connections(monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr("socket.create_connection", connect)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_pass(address):
    assert is_public(ipaddress.ip_address(address))
    UrlPolicy().check_addresses(parse_url("http://a.example/"), [ipaddress.ip_address(address)])


@settings(max_examples=500, deadline=None)
@given(st.ip_addresses())
def test_nothing_that_python_calls_local_is_public(address):
    if is_public(address):
        assert address.is_global and not address.is_multicast and not address.is_private and not address.is_reserved
        assert getattr(address, "ipv4_mapped", None) is None and getattr(address, "sixtofour", None) is None


@pytest.mark.parametrize("text", ["fe80::1%eth0", "2606:4700::1%1", "127.1", "0x7f.1", "localhost", "", "1.2.3.4/8"])
def test_what_a_resolver_may_not_answer(text):
    with pytest.raises(LineError):
        parse_address(text)


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://Example.COM", "example.com", 80, "/"),
        ("HTTPS://example.com?a=b", "example.com", 443, "/?a=b"),
        ("https://example.com:443/a%20b?c=d#frag", "example.com", 443, "/a%20b?c=d"),
        ("http://xn--exmple-cua.com/", "xn--exmple-cua.com", 80, "/"),
        ("http://8.8.8.8/x", "8.8.8.8", 80, "/x"),
        ("http://[2606:4700:4700:0:0:0:0:1111]:80/x", "2606:4700:4700::1111", 80, "/x"),
        ("http://my_bucket.s3.example.com/x@y", "my_bucket.s3.example.com", 80, "/x@y"),
    ],
)
def test_good_urls(url, host, port, path):
    target = parse_url(url)
    assert (target.host, target.port, target.path) == (host, port, path)


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(codec="ascii") | st.sampled_from("①．。@\\/:[]%.#?"), max_size=30))
def test_a_host_is_never_read_differently_from_what_urllib_reads(rest):
    from urllib.parse import urlsplit

    url = "http://" + rest
    try:
        target = parse_url(url)
    except LineError:
        return
    parts = urlsplit(url)
    assert parts.username is None and parts.hostname is not None
    if target.address is None:
        assert parts.hostname == target.host
    else:
        assert ipaddress.ip_address(parts.hostname) == target.address
    assert (parts.port or 80) == target.port


def policy(*rules):
    return UrlPolicy(tuple(HostRule.parse(rule) for rule in rules))


@pytest.mark.parametrize(
    ("rules", "url", "allowed"),
    [
        (["example.com"], "https://example.com/x", True),
        (["example.com"], "https://EXAMPLE.com/x", True),
        (["example.com"], "https://a.example.com/x", False),
        (["example.com"], "https://notexample.com/x", False),
        (["example.com"], "https://example.com.evil.org/x", False),
        (["example.com"], "https://example.com:8443/x", False),
        (["*.example.com"], "https://a.b.example.com/x", True),
        (["*.example.com"], "https://example.com/x", False),
        (["*.example.com"], "https://evilexample.com/x", False),
        (["a.org", "*.example.com"], "http://a.org/x", True),
        (["example.com:8443"], "https://example.com:8443/x", True),
        (["example.com:8443"], "https://example.com/x", False),
        (["127.0.0.1:8000"], "http://127.0.0.1:8000/x", True),
        (["[::1]:8000"], "http://[::1]:8000/x", True),
        (["8.8.8.8"], "http://8.8.8.8/x", True),
    ],
)
def test_allowed_hosts(rules, url, allowed):
    target = parse_url(url)
    if allowed:
        policy(*rules).check_target(target)
    else:
        with pytest.raises(LineError, match="allow-host"):
            policy(*rules).check_target(target)


def test_only_a_rule_with_a_port_opens_private_addresses():
    loopback = [ipaddress.ip_address("127.0.0.1")]
    policy("images.internal:8000").check_addresses(parse_url("http://images.internal:8000/"), loopback)
    for rule in ("images.internal", "127.0.0.1", "*.internal", "other:8000"):
        url = "http://images.internal/"
        with pytest.raises(LineError, match="not a public address"):
            policy(rule).check_addresses(parse_url(url), loopback)


@pytest.mark.parametrize(
    "text",
    ["", "*", "*.", "http://a.com", "a.com/", "a.com/x", "a b", "*.a.com:80", "*.1.2.3.4", "127.1", "a.com:0", "é.com",
     "u@a"],
)  # fmt: skip
def test_bad_rules_are_usage_errors(text):
    with pytest.raises(UsageError, match="allow-host"):
        HostRule.parse(text)
