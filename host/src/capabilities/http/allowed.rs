//! Where guests may send requests: servers by name or address, and networks in which those names may lie.

use hyper::Uri;
use hyper::http::uri::Authority;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// What `--allow-http` takes, for errors.
const USAGE: &str = "https://HOST or http://HOST, with :PORT if it is not the usual one, or NETWORK/BITS for networks \
                     in which such hosts may lie";

/// Longest name of a host, in bytes.
const NAME_MAX_BYTES: usize = 253;

/// One entry of the operator's list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// A server that guests may ask. One that is listed by its address may be in any network.
    Server(Server),
    /// A network in which servers may be that are listed by name, although it is not a public one.
    Network(Network),
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tls, authority) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some(_) => return Err(USAGE.to_owned()),
            None if text.contains('/') => return text.parse().map(Self::Network),
            None => (true, text),
        };
        let server = authority.parse().ok().and_then(|authority| Server::of(tls, &authority));
        server.filter(|server| server.host.is_sound()).map(Self::Server).ok_or_else(|| USAGE.to_owned())
    }
}

/// Whether `list` has the server, by the name or address that the guest gave.
pub(super) fn lists(list: &[Allowed], server: &Server) -> bool {
    list.iter().any(|allowed| matches!(allowed, Allowed::Server(listed) if listed == server))
}

/// Whether a server that is listed may be at `address`: a public one, or one that is listed too.
pub(super) fn admits(list: &[Allowed], address: SocketAddr) -> bool {
    let ip = address.ip();
    is_public(ip)
        || list.iter().any(|allowed| match allowed {
            Allowed::Server(server) => server.host == Host::Address(ip) && server.port == address.port(),
            Allowed::Network(network) => network.contains(ip),
        })
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Whether the connection is encrypted, and the server has to prove that it is the one.
    pub tls: bool,
    /// Which one.
    pub host: Host,
    /// The port, the usual one of the scheme if none is said.
    pub port: u16,
}

/// A host as it is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A name, in lower case.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl Server {
    /// The server that `uri` names. Nothing where it names none, or carries a login.
    pub fn named_in(uri: &Uri) -> Option<Self> {
        let tls = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        Self::of(tls, uri.authority()?)
    }

    fn of(tls: bool, authority: &Authority) -> Option<Self> {
        // With a login in front of the host this is not what it begins with.
        let port = match authority.as_str().strip_prefix(authority.host())? {
            "" if tls => 443,
            "" => 80,
            rest => {
                let digits = rest.strip_prefix(':')?;
                digits.parse().ok().filter(|&port| port != 0 && digits.bytes().all(|byte| byte.is_ascii_digit()))?
            }
        };
        Some(Self { tls, host: Host::of(authority.host())?, port })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        match &self.host {
            Host::Name(name) => write!(f, "{scheme}://{name}:{}", self.port),
            Host::Address(ip) => write!(f, "{scheme}://{}", SocketAddr::new(*ip, self.port)),
        }
    }
}

impl Host {
    fn of(text: &str) -> Option<Self> {
        match text.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']')?.parse().ok().map(|ip: Ipv6Addr| Self::Address(ip.into())),
            None => Some(match text.parse::<Ipv4Addr>() {
                Ok(ip) => Self::Address(ip.into()),
                Err(_) => Self::Name(text.to_ascii_lowercase()),
            }),
        }
    }

    /// Whether it can be listed: a name of labels that is not one of the old ways to write an address, as `127.1` and
    /// `0x7f000001` are.
    fn is_sound(&self) -> bool {
        let Self::Name(name) = self else { return true };
        let is_label = |label: &str| {
            !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        let last = name.rsplit('.').next().unwrap_or_default();
        name.len() <= NAME_MAX_BYTES
            && name.split('.').all(is_label)
            && !last.bytes().all(|byte| byte.is_ascii_digit())
            && !last.starts_with("0x")
    }
}

/// All addresses that begin with the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    first: IpAddr,
    bits: u8,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, bits) = text.split_once('/').ok_or(USAGE)?;
        let first: IpAddr = first.parse().map_err(|_| USAGE)?;
        let bits = bits.parse().ok().filter(|&bits| bits <= if first.is_ipv4() { 32 } else { 128 }).ok_or(USAGE)?;
        let network = Self { first, bits };
        match number(first) == number(first) & network.mask() {
            true => Ok(network),
            false => Err(format!("{first} is not the first address of a network of {bits} bits")),
        }
    }
}

impl Network {
    const fn v4(a: u8, b: u8, c: u8, d: u8, bits: u8) -> Self {
        Self { first: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), bits }
    }

    const fn v6(a: u16, b: u16, bits: u8) -> Self {
        Self { first: IpAddr::V6(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0)), bits }
    }

    /// Whether the address is one of it. An IPv4 address in the clothes of IPv6 is none of an IPv4 network.
    fn contains(&self, address: IpAddr) -> bool {
        self.first.is_ipv4() == address.is_ipv4() && number(self.first) == number(address) & self.mask()
    }

    /// The bits that are the same in all addresses, where [`number`] has them.
    fn mask(&self) -> u128 {
        !u128::MAX.checked_shr(self.bits.into()).unwrap_or(0)
    }
}

/// The address from the highest bit on.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => ip.into(),
    }
}

/// A network without servers.
#[cfg(feature = "compile")]
pub(super) const NOWHERE: Network = Network::v4(0, 0, 0, 0, 32);

/// What does not lead to one server on the Internet (IANA's registries of special-purpose addresses).
const SPECIAL: [Network; 19] = [
    Network::v4(0, 0, 0, 0, 8),       // this network
    Network::v4(10, 0, 0, 0, 8),      // private
    Network::v4(100, 64, 0, 0, 10),   // shared by the customers of a carrier
    Network::v4(127, 0, 0, 0, 8),     // loopback
    Network::v4(169, 254, 0, 0, 16),  // link-local; clouds tell their machines' secrets there
    Network::v4(172, 16, 0, 0, 12),   // private
    Network::v4(192, 0, 0, 0, 24),    // protocols
    Network::v4(192, 0, 2, 0, 24),    // documentation
    Network::v4(192, 88, 99, 0, 24),  // relays to IPv6
    Network::v4(192, 168, 0, 0, 16),  // private
    Network::v4(198, 18, 0, 0, 15),   // benchmarks
    Network::v4(198, 51, 100, 0, 24), // documentation
    Network::v4(203, 0, 113, 0, 24),  // documentation
    Network::v4(224, 0, 0, 0, 4),     // multicast
    Network::v4(240, 0, 0, 0, 4),     // reserved, broadcast
    Network::v6(0x2001, 0, 23),       // protocols, Teredo
    Network::v6(0x2001, 0xdb8, 32),   // documentation
    Network::v6(0x2002, 0, 16),       // IPv4 in IPv6: 6to4
    Network::v6(0x3fff, 0, 20),       // documentation
];

/// The part of IPv6 from which public addresses are given out. Outside of it are loopback, unique-local, link-local and
/// multicast addresses, and IPv4 addresses in the clothes of IPv6 (mapped, NAT64).
const GLOBAL_UNICAST: Network = Network::v6(0x2000, 0, 3);

/// Whether the address leads to one server on the Internet.
fn is_public(address: IpAddr) -> bool {
    (address.is_ipv4() || GLOBAL_UNICAST.contains(address)) && !SPECIAL.iter().any(|network| network.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn list(entries: &[&str]) -> Vec<Allowed> {
        entries.iter().map(|entry| entry.parse().expect("an entry")).collect()
    }

    #[test]
    fn only_addresses_of_servers_on_the_internet_are_public() {
        for public in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.1",
            "192.167.255.255",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2000::1",
            "2001:200::1",
            "2606:4700:4700::1111",
            "2a00:1450:4001:81b::200e",
            "3ffe::1",
        ] {
            assert!(is_public(ip(public)), "{public}");
        }
        for special in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.0.170",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:1.1.1.1",
            "::ffff:0:1.1.1.1",
            "64:ff9b::1.1.1.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "100::1",
            "1fff:ffff::1",
            "2001::1",
            "2001:0:53aa:64c::1",
            "2001:2::1",
            "2001:10::1",
            "2001:20::1",
            "2001:db8::1",
            "2002::1",
            "2002:7f00:1::1",
            "2002:a00:1::1",
            "3fff::1",
            "3fff:fff::1",
            "4000::1",
            "5f00::1",
            "fc00::1",
            "fd12:3456:789a::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "ff0e::1",
        ] {
            assert!(!is_public(ip(special)), "{special}");
        }
    }

    #[test]
    fn entries_are_servers_or_networks() {
        for (text, meant) in [
            ("api.example.org", "https://api.example.org:443"),
            ("api.example.org:8443", "https://api.example.org:8443"),
            ("https://API.Example.org", "https://api.example.org:443"),
            ("http://api.example.org", "http://api.example.org:80"),
            ("http://10.0.0.5:8080", "http://10.0.0.5:8080"),
            ("https://[fd00::1]", "https://[fd00::1]:443"),
            ("http://my_service", "http://my_service:80"),
        ] {
            match text.parse() {
                Ok(Allowed::Server(server)) => assert_eq!(server.to_string(), meant),
                other => panic!("{text}: {other:?}"),
            }
        }
        for text in ["10.0.0.0/8", "0.0.0.0/0", "192.168.1.1/32", "fd00::/8", "::/0", "::1/128"] {
            assert!(matches!(text.parse(), Ok(Allowed::Network(_))), "{text}");
        }
        for text in [
            "",
            "https://",
            "ftp://example.org",
            "https://example.org/path",
            "https://user@example.org",
            "https://user:secret@example.org",
            "https://example.org:0",
            "https://example.org:65536",
            "https://example.org:+443",
            "https://example.org:",
            "https://*.example.org",
            "https://example..org",
            "https://example.org.",
            "https://exämple.org",
            "fd00::1",
            "http://127.1",
            "http://2130706433",
            "http://0x7f000001",
            "http://0x7f.0.0.1",
            "http://1.2.3.4.5",
            "http://[::1",
            "http://[1.2.3.4]",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "fd00::/129",
            "10.0.0.0/",
            "example.org/24",
        ] {
            assert!(text.parse::<Allowed>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_request_goes_where_the_list_says_and_nowhere_else() {
        let list = list(&["api.example.org", "http://10.0.0.5:8080", "http://[::1]:80", "10.1.0.0/16"]);
        let allowed = |uri: &str| {
            let uri = uri.parse().expect("a URI");
            Server::named_in(&uri).is_some_and(|server| lists(&list, &server))
        };
        for uri in [
            "https://api.example.org/path",
            "https://api.example.org:443/",
            "https://API.example.ORG/",
            "http://10.0.0.5:8080/",
            "http://[::1]/",
            "http://[0:0:0:0:0:0:0:1]:80/",
        ] {
            assert!(allowed(uri), "{uri}");
        }
        for uri in [
            "http://api.example.org/",
            "https://api.example.org:80/",
            "https://api.example.org.evil.test/",
            "https://evil.test/api.example.org",
            "https://api.example.org@evil.test/",
            "https://evil.test@api.example.org/",
            "https://api.example.org:99999/",
            "https://api.example.org./",
            "https://xapi.example.org/",
            "http://10.0.0.5/",
            "http://10.0.0.6:8080/",
            "http://10.1.0.1/",
            "http://[::ffff:10.0.0.5]:8080/",
            "http://010.0.0.5:8080/",
            "http://167772165:8080/",
            "/only/a/path",
        ] {
            assert!(!allowed(uri), "{uri}");
        }
    }

    #[test]
    fn what_is_not_public_has_to_be_listed_itself() {
        let list = list(&["api.example.org", "http://10.0.0.5:8080", "10.1.0.0/16", "fd00::/8"]);
        for address in ["1.1.1.1:443", "10.0.0.5:8080", "10.1.2.3:443", "[fd12::1]:80", "[2606:4700::1]:443"] {
            assert!(admits(&list, address.parse().expect("an address")), "{address}");
        }
        for address in [
            "127.0.0.1:443",
            "10.0.0.5:443",
            "10.0.0.6:8080",
            "10.2.0.1:443",
            "169.254.169.254:80",
            "[::ffff:10.1.2.3]:443",
            "[::ffff:10.0.0.5]:8080",
            "[64:ff9b::a01:203]:443",
            "[fc00::1]:443",
        ] {
            assert!(!admits(&list, address.parse().expect("an address")), "{address}");
        }
    }
}
