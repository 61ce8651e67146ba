//! What the operator set for the runtime in containerd's configuration.

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim::protos::protobuf::CodedInputStream;
use containerd_shim::protos::protobuf::rt::WireType;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where an executable of a container's bundle finds the options again.
const FILE: &str = "mailroom-options.json";

/// The runtime options, in TOML under these names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct Options {
    /// The OCI runtime that makes containers: a name on containerd's PATH, or a path.
    pub binary_name: String,
    /// Whether it makes cgroups through systemd. They are in any case where their path is one of systemd's.
    pub systemd_cgroup: bool,
    /// The folder of compiled components. Only root may write there: what lies in it is run.
    pub cache: PathBuf,
    /// The most bytes in the cache; the least recently used components go first.
    pub cache_max_bytes: u64,
    /// Whether an image may bring its component compiled. Such an image is trusted like one with an executable of its
    /// own: nothing confines machine code but the container.
    pub allow_compiled: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            binary_name: "runc".into(),
            systemd_cgroup: false,
            cache: "/var/lib/mailroom/compiled".into(),
            cache_max_bytes: 1 << 30,
            allow_compiled: false,
        }
    }
}

impl Options {
    /// Reads what containerd passes on: a TOML text or the path of one, from the runtime's table in its configuration or
    /// from `ctr --runtime-config-path`. Without any, the defaults.
    ///
    /// # Errors
    /// A file that cannot be read, TOML that has other keys or types, options of another kind.
    pub fn from_any(options: Option<&Any>) -> Result<Self> {
        let Some(any) = options.filter(|any| !any.type_url.is_empty()) else { return Ok(Self::default()) };
        ensure!(
            any.type_url.contains("runtimeoptions"),
            "runtime options of type {}: it takes TOML, by `ConfigPath` in the runtime's options",
            any.type_url
        );
        let Config { path, body } = Config::read(&any.value).context("read the runtime's options")?;
        let (text, place) = if !body.is_empty() {
            (String::from_utf8(body).context("the runtime's options are no UTF-8")?, "the runtime's options".into())
        } else if !path.is_empty() {
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("read {path}, the runtime's ConfigPath"))?;
            (text, path)
        } else {
            return Ok(Self::default());
        };
        toml::from_str::<Self>(&text).map_err(anyhow::Error::from).and_then(Self::checked).context(place)
    }

    fn checked(self) -> Result<Self> {
        ensure!(!self.binary_name.is_empty(), "BinaryName is empty; `runc` is usual");
        ensure!(self.cache.is_absolute(), "Cache {}: is no absolute path", self.cache.display());
        Ok(self)
    }

    /// Keeps them for a later call of the shim that gets none: the one that cleans up.
    ///
    /// # Errors
    /// A bundle that cannot be written to.
    pub fn keep(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(FILE);
        std::fs::write(&path, serde_json::to_vec(self)?).with_context(|| format!("write {}", path.display()))
    }

    /// Those that were kept; the defaults, if none were.
    pub fn kept(bundle: &Path) -> Self {
        std::fs::read(bundle.join(FILE)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }
}

/// The message `runtimeoptions.v1.Options` of containerd's, of which the library has no code.
#[derive(Default)]
struct Config {
    path: String,
    body: Vec<u8>,
}

impl Config {
    fn read(bytes: &[u8]) -> Result<Self> {
        let mut config = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match (tag >> 3, tag & 7) {
                (2, 2) => config.path = input.read_string()?,
                (3, 2) => config.body = input.read_bytes()?,
                (_, wire) => match WireType::new(wire) {
                    Some(wire) => input.skip_field(wire)?,
                    None => bail!("a field of no known kind"),
                },
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.into(), value: value.into(), ..Default::default() }
    }

    fn field(number: u8, text: &str) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(text.len()).expect("short")], text.as_bytes()].concat()
    }

    #[test]
    fn options_come_as_toml_or_not_at_all() {
        assert_eq!(Options::from_any(None).expect("defaults"), Options::default());
        let crun = Options { binary_name: "crun".into(), systemd_cgroup: true, ..Options::default() };
        let text = "BinaryName = 'crun'\nSystemdCgroup = true\n";
        let body = [field(1, "io.containerd.mailroom.v1"), field(3, text)].concat();
        assert_eq!(Options::from_any(Some(&any("runtimeoptions.v1.Options", &body))).expect("a body"), crun);
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(&file, text).expect("write");
        let path = field(2, file.path().to_str().expect("UTF-8"));
        let by_path = any("github.com/containerd/cri/pkg/api/runtimeoptions/v1/Options", &path);
        assert_eq!(Options::from_any(Some(&by_path)).expect("a path"), crun);
    }

    #[test]
    fn wrong_options_are_named() {
        for (text, named) in [
            ("Binary = 'crun'", "unknown field `Binary`"),
            ("SystemdCgroup = 'yes'", "SystemdCgroup"),
            ("Cache = 'here'", "no absolute path"),
            ("BinaryName = ''", "BinaryName is empty"),
        ] {
            let options = Options::from_any(Some(&any("runtimeoptions.v1.Options", &field(3, text))));
            let error = format!("{:#}", options.expect_err(text));
            assert!(error.contains(named), "{error}");
        }
        let missing = any("runtimeoptions.v1.Options", &field(2, "/nowhere/shim.toml"));
        assert!(
            format!("{:#}", Options::from_any(Some(&missing)).expect_err("no file")).contains("/nowhere/shim.toml")
        );
        assert!(Options::from_any(Some(&any("other.Options", b""))).is_err());
    }
}
