//! A network for pods: a bridge of the test's own with an address on it.

use anyhow::{Context as _, Result, bail};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use tests::tools;

/// A bridge that only one node uses, and its network; removed when dropped.
///
/// The networks are those of 198.18.0.0/16, which is set aside for tests of network devices.
#[derive(Debug)]
pub struct Bridge {
    number: u8,
}

impl Bridge {
    /// Makes a bridge with the first address of a network that no other has.
    ///
    /// # Errors
    /// Without the right to, or when all 256 networks are in use.
    pub fn new() -> Result<Self> {
        for number in 0..=u8::MAX {
            let link = name(number);
            // With an address of its own: a bridge that has none takes the lowest of its ports', so when that pod leaves,
            // the others talk to an address that nobody has until their neighbour tables forget it.
            let hardware = format!("02:00:c6:12:{number:02x}:01");
            let made = ip(&["link", "add", &link, "address", &hardware, "type", "bridge"]);
            match made {
                Err(_) if Path::new("/sys/class/net").join(&link).exists() => {}
                Err(err) => return Err(err.context("make a bridge for pods")),
                Ok(()) => {
                    let bridge = Self { number };
                    ip(&["address", "add", &format!("{}/24", bridge.address()), "dev", &link])?;
                    ip(&["link", "set", &link, "up"])?;
                    return Ok(bridge);
                }
            }
        }
        bail!("all of the tests' 256 bridges are there already; `ip link delete` those that nothing uses")
    }

    /// The address that this machine has in the network.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 1)
    }

    /// The CNI configuration that connects pods to the bridge; `state` is a folder for what it notes.
    ///
    /// The bridge is no gateway for CNI: that would turn on forwarding for the whole machine.
    pub fn cni(&self, state: &Path) -> String {
        let (link, Self { number }) = (name(self.number), self);
        format!(
            r#"{{
  "cniVersion": "0.4.0",
  "name": "{link}",
  "plugins": [
    {{
      "type": "bridge",
      "bridge": "{link}",
      "isGateway": false,
      "ipMasq": false,
      "ipam": {{
        "type": "host-local",
        "dataDir": {state:?},
        "ranges": [[{{ "subnet": "198.18.{number}.0/24" }}]]
      }}
    }}
  ]
}}"#
        )
    }

    /// How many pods are connected.
    pub fn ports(&self) -> usize {
        let ports = Path::new("/sys/class/net").join(name(self.number)).join("brif");
        ports.read_dir().into_iter().flatten().count()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // Fails only if someone else has removed it.
        _ = ip(&["link", "delete", &name(self.number)]);
    }
}

fn name(number: u8) -> String {
    format!("mailroom{number}")
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new(tools::installed("ip", "iproute2")?).args(args).output().context("start ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
