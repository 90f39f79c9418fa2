"""Which URLs and which addresses a picture may come from: strict parsing, and nothing that is not globally reachable.

Address blocks: IANA's special-purpose registries for IPv4 and IPv6. Whatever embeds an IPv4 address in an IPv6 one
(mapped, compatible, 6to4, Teredo, NAT64) is refused as a whole.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from batch.schema import LineError
from l4tool.core.errors import UsageError

MAX_URL_CHARS = 16_384
DEFAULT_PORTS = {"http": 80, "https": 443}
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_REFUSED_V4 = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = tuple(ipaddress.IPv6Network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
_URL = re.compile(r"(https?)://([^/?#]*)([/?][^#]*)?(?:#.*)?\Z", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?\Z")
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]|[^\x00-\x7f]")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
_NUMBER = re.compile(r"[0-9]+\Z|0x[0-9a-f]*\Z")


@dataclass(frozen=True)
class Target:
    """One hop, as it will be asked for. `address` is set when the host is written as an address."""

    scheme: str
    host: str
    port: int
    path: str
    address: Address | None = None

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def refuse(message: str) -> LineError:
    """The error of a URL that is not asked for at all."""
    return LineError("url_not_allowed", message)


def parse_url(text: str) -> Target:
    """A URL, taken apart so strictly that no two readers can differ about its host. Raises LineError."""
    if len(text) > MAX_URL_CHARS:
        raise refuse(f"a URL of more than {MAX_URL_CHARS:,} characters")
    if _UNSAFE.search(text):
        raise refuse("a URL holds only printable ASCII: no spaces, no backslash, other characters as % or xn--")
    match = _URL.match(text)
    if match is None:
        raise refuse("not a http:// or https:// URL")
    scheme, authority, path = match[1].lower(), match[2], match[3] or "/"
    if "@" in authority:
        raise refuse("a URL with a user name or password")
    parts = _AUTHORITY.match(authority)
    if parts is None:
        raise refuse("a URL whose host is not a plain name or address")
    port = DEFAULT_PORTS[scheme] if parts[3] is None else int(parts[3])
    if not 0 < port < 65536:
        raise refuse(f"no such port: {port}")
    host, address = _host(parts[1], parts[2])
    return Target(scheme, host, port, path if path.startswith("/") else "/" + path, address)


def _host(v6: str | None, name: str | None) -> tuple[str, Address | None]:
    if v6 is not None:
        try:
            address: Address = ipaddress.IPv6Address(v6)
        except ValueError:
            raise refuse("not an IPv6 address in the URL's brackets") from None
        return str(address), address
    host = (name or "").lower()
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.match(label) for label in labels):
        raise refuse("a URL whose host is not a plain name or address")
    if not _NUMBER.match(labels[-1]):
        return host, None
    try:  # decimal, octal, hexadecimal and short spellings end here
        address = ipaddress.IPv4Address(host)
    except ValueError:
        raise refuse("an IPv4 address is written as four decimal numbers") from None
    return str(address), address


def parse_address(text: str) -> Address:
    """An address from a resolver. Raises LineError for what has a zone or is no address."""
    try:
        if "%" not in text:
            return ipaddress.ip_address(text)
    except ValueError:
        pass
    raise refuse(f"{text[:60]!r} is not an address that can be checked")


def is_public(address: Address) -> bool:
    """Whether an address is globally reachable unicast, and no detour to one that is not."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in block for block in _REFUSED_V4)
    return (
        address.scope_id is None
        and address in _GLOBAL_V6
        and address.is_global
        and not any(address in block for block in _REFUSED_V6)
    )


@dataclass(frozen=True)
class HostRule:
    """One --allow-host. `name` begins with "." when it stands for all names below it."""

    name: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """`host`, `*.suffix` or `host:port`. Raises UsageError."""
        hint = "--allow-host takes example.com, *.example.com, 10.0.0.7:8080 or [::1]:8080"
        is_suffix = text.startswith("*.")
        try:
            target = parse_url(f"http://{text.removeprefix('*.')}")
        except LineError as error:
            raise UsageError(f"--allow-host {text!r}: {error.message}", hint=hint) from None
        port = target.port if re.search(r":[0-9]+\Z", text) else None
        if target.path != "/" or "/" in text or "?" in text or "#" in text:
            raise UsageError(f"--allow-host {text!r}: a host, not a URL", hint=hint)
        if is_suffix and (port is not None or target.address is not None):
            raise UsageError(f"--allow-host {text!r}: '*.' goes with a name and without a port", hint=hint)
        return cls("." + target.host if is_suffix else target.host, port)

    def matches(self, target: Target) -> bool:
        if self.port is not None and self.port != target.port:
            return False
        return target.host.endswith(self.name) if self.name.startswith(".") else target.host == self.name


@dataclass(frozen=True)
class UrlPolicy:
    """Where pictures may come from. Without rules: every public host on its scheme's own port.

    A rule with a port is an operator's word for one server: that port is open, and its address may be private.
    """

    rules: tuple[HostRule, ...] = ()

    def check_target(self, target: Target) -> None:
        """Before any name is looked up. Raises LineError."""
        rules = [rule for rule in self.rules if rule.matches(target)]
        if self.rules and not rules:
            raise refuse(f"{target.host_header} is not among --allow-host")
        if target.port not in DEFAULT_PORTS.values() and not any(rule.port for rule in rules):
            raise refuse(f"port {target.port} is not allowed; --allow-host {target.host_header} would allow it")

    def check_addresses(self, target: Target, addresses: Sequence[Address]) -> None:
        """All addresses that a name has, before any of them is used. Raises LineError."""
        if any(rule.port is not None and rule.matches(target) for rule in self.rules):
            return
        if not all(is_public(address) for address in addresses):
            own = "a server of your own is named with its port: --allow-host HOST:PORT"
            raise refuse(f"{target.host} is not a public address; {own}")
