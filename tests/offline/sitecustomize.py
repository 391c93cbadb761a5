"""On the path of every Python that the tests start, kernels too: no network.

Connections leave this machine for nowhere.
"""

import ipaddress
import socket

_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex
_getaddrinfo = socket.getaddrinfo


def _is_local(host) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(
            host.decode() if isinstance(host, bytes) else host
        ).is_loopback
    except ValueError:
        return False


def _refuse(host):
    raise OSError(f"the network is off in tests: {host!r} was asked for")


def _checked(original):
    def connect(self, address):
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and not _is_local(address[0]):
            _refuse(address[0])
        return original(self, address)

    return connect


def _local_getaddrinfo(host, *arguments, **options):
    return (
        _getaddrinfo(host, *arguments, **options) if _is_local(host) else _refuse(host)
    )


socket.socket.connect, socket.socket.connect_ex = (
    _checked(_connect),
    _checked(_connect_ex),
)
socket.getaddrinfo = _local_getaddrinfo
