//! `host image`: container images of a component, made without a container engine.

mod executable;
mod layout;

use crate::capabilities::Grants;
use crate::cli::print;
use crate::component::{Interfaces, from_bytes, machine_code, read_component, write_atomically};
use crate::engine::Cpu;
use crate::pool::{Guest, Limits, Pools};
use anyhow::{Context, Result, bail, ensure};
use layout::{Blob, Created, File, Layout, Manifest, Name, layer};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Make a container image of a component, without a container engine
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples, with an image for nodes that have the shim, and one for all others:
  host image triage.wasm --name registry.example.com/team/triage:1.0
  host image triage.wasm --name registry.example.com/team/triage-host:1.0 --format host
  host image triage.wasm --name localhost/triage:1.0 --arg=--slots=8 --env MAILROOM_DEADLINE=5s
  host image triage.wasm --name localhost/triage:1.0 --output - | ctr -n k8s.io image import -

Prints the image's name with its digest. The same input gives the same bytes; the time in it is
SOURCE_DATE_EPOCH (in seconds) or the beginning of 1970.
Exit codes: 0 written, 1 failed, 2 wrong usage.")]
pub struct ImageArgs {
    /// The component, or a core module with its world embedded
    component: PathBuf,

    /// What the image is called: REGISTRY/PATH:TAG
    #[arg(short, long, value_name = "NAME", env = "MAILROOM_IMAGE_NAME")]
    name: Name,

    /// Where to write: FILE.tar, a new FOLDER/, or - for standard output [default: COMPONENT with .tar]
    #[arg(short, long, value_name = "PATH", env = "MAILROOM_OUTPUT")]
    output: Option<PathBuf>,

    /// What kind of image
    #[arg(long, value_enum, default_value = "component", env = "MAILROOM_IMAGE_FORMAT")]
    format: Format,

    /// Argument for `host run`, unless the pod gives others; repeatable
    #[arg(long = "arg", value_name = "ARG", env = "MAILROOM_IMAGE_ARG", allow_hyphen_values = true)]
    args: Vec<String>,

    /// Environment variable, unless the pod gives another value; repeatable
    #[arg(long = "env", value_name = "NAME=VALUE", env = "MAILROOM_IMAGE_ENV")]
    environment: Vec<Pair>,

    /// User and group that it runs as, unless the pod gives others [default: 65532:65532]
    #[arg(long, value_name = "UID[:GID]", env = "MAILROOM_IMAGE_USER")]
    user: Option<User>,

    /// Authorities for tls:// servers, in PEM, where an image has none of its own
    #[arg(long, value_name = "FILE", env = "MAILROOM_IMAGE_CA_CERTIFICATES")]
    ca_certificates: Option<PathBuf>,

    /// Say this about the image, such as org.opencontainers.image.source=URL; repeatable
    #[arg(long = "annotation", value_name = "KEY=VALUE", env = "MAILROOM_IMAGE_ANNOTATION")]
    annotations: Vec<Pair>,

    /// How the layer is compressed
    #[arg(long, value_enum, default_value = "gzip", env = "MAILROOM_IMAGE_COMPRESSION")]
    compression: Compression,

    /// With --format host: the host for the image, linked statically [default: mailroom-host beside this one, or this one]
    #[arg(long, value_name = "FILE", env = "MAILROOM_IMAGE_EXECUTABLE")]
    executable: Option<PathBuf>,

    /// With --format host: the processor to compile for; code for a newer one is refused where it would run
    #[arg(long, value_enum, default_value_t, env = "MAILROOM_CPU")]
    cpu: Cpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// The component alone, which nodes with the shim run
    Component,
    /// The component as the CNCF's wasm artifact, for registries and tools
    Artifact,
    /// The host and the component compiled, which every node runs
    Host,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Compression {
    /// As usual
    Gzip,
    /// Not at all
    None,
}

/// `KEY=VALUE`; the value may be empty.
#[derive(Debug, Clone)]
struct Pair {
    key: String,
    value: String,
}

impl FromStr for Pair {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self { key: key.to_owned(), value: value.to_owned() }),
            _ => Err("needs a name, = and a value"),
        }
    }
}

/// A user and a group by number: there is no list of names in the image.
#[derive(Debug, Clone)]
struct User(String);

impl FromStr for User {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut ids = text.splitn(2, ':').map(str::parse::<u32>);
        if ids.all(|id| id.is_ok()) { Ok(Self(text.to_owned())) } else { Err("takes numbers, as in 65532:65532") }
    }
}

/// Nobody's user and group on usual systems, and the one that images without a system in them mostly run as.
const USER: &str = "65532:65532";

/// Where rustls, as other TLS libraries, looks for authorities first.
const CA_CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

/// The bounds for trying the component out, as wide as `host run` might be told to set them.
const WIDEST: Limits = Limits {
    slots: Some(1),
    memory_max_bytes: 4 << 30,
    deadline: Duration::from_secs(10),
    output_max_bytes: 64 << 20,
    host_calls_max: u64::MAX,
};

impl ImageArgs {
    /// Carries out `host image`.
    ///
    /// # Errors
    /// A component that `host run` would not start with, an executable that would not start in the image, flags that
    /// do not go together, an output that cannot be written.
    pub fn execute(&self) -> Result<ExitCode> {
        self.check()?;
        let output = self.output.clone().unwrap_or_else(|| self.component.with_extension("tar"));
        let target = Target::of(&output)?;
        let created = created()?;
        let component = read_component(&self.component)?.into_owned();
        check_guest(&self.component, &component)?;
        let manifest = match self.format {
            Format::Component => self.component_image(component, &created)?,
            Format::Artifact => self.artifact(component, &created)?,
            Format::Host => self.host_image(&component, &created)?,
        };
        let layout = Layout::new(manifest, &self.name)?;
        let written = match target {
            Target::Tar => {
                let tar = layout.to_tar(&created)?;
                write_atomically(&output, &tar).map(|()| tar.len())
            }
            Target::Folder => layout.write_folder(&output),
            Target::StandardOutput => {
                print(layout.to_tar(&created)?)?;
                return Ok(ExitCode::SUCCESS);
            }
        };
        let bytes = written.with_context(|| format!("write {}", output.display()))?;
        eprintln!("{}: {bytes} bytes", output.display());
        print(format!("{}@{}\n", self.name.full, layout.digest))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Refuses flags that would have no effect.
    fn check(&self) -> Result<()> {
        let takes_executable = self.format == Format::Host;
        ensure!(takes_executable || self.executable.is_none(), "--executable goes with --format host only");
        if self.format == Format::Artifact {
            for (flag, given) in [
                ("--arg", !self.args.is_empty()),
                ("--env", !self.environment.is_empty()),
                ("--user", self.user.is_some()),
                ("--ca-certificates", self.ca_certificates.is_some()),
            ] {
                ensure!(!given, "{flag}: an artifact is the component and nothing else");
            }
        }
        Ok(())
    }

    fn component_image(&self, component: Vec<u8>, created: &Created) -> Result<Manifest> {
        let path = self.file_name("wasm")?;
        let entrypoint = vec![format!("/{path}")];
        self.image(vec![File { path, mode: 0o755, bytes: component }], entrypoint, created)
    }

    fn host_image(&self, component: &[u8], created: &Created) -> Result<Manifest> {
        let executable = match &self.executable {
            Some(executable) => executable.clone(),
            None => beside()?,
        };
        let shown = executable.display();
        let bytes = fs::read(&executable).with_context(|| format!("read {shown}"))?;
        let bytes = executable::stripped(bytes).with_context(|| shown.to_string())?;
        let machine_code = machine_code(component, self.cpu)?;
        executable::try_out(&executable.canonicalize()?, &machine_code)?;
        let path = self.file_name("cwasm")?;
        let entrypoint = ["/host", "run", "--component"].map(String::from).into_iter().chain([format!("/{path}")]);
        let entrypoint = entrypoint.collect();
        let host = File { path: "host".into(), mode: 0o755, bytes };
        self.image(vec![host, File { path, mode: 0o644, bytes: machine_code }], entrypoint, created)
    }

    fn image(&self, mut files: Vec<File>, entrypoint: Vec<String>, created: &Created) -> Result<Manifest> {
        if let Some(file) = &self.ca_certificates {
            let shown = file.display();
            let bytes = fs::read(file).with_context(|| format!("read --ca-certificates {shown}"))?;
            let holds = |what: &str| String::from_utf8_lossy(&bytes).contains(what);
            ensure!(holds("-----BEGIN CERTIFICATE-----"), "--ca-certificates {shown}: no certificate in this file");
            ensure!(
                !holds("PRIVATE KEY-----"),
                "--ca-certificates {shown}: holds a private key, which belongs into no image"
            );
            files.push(File { path: CA_CERTIFICATES.into(), mode: 0o644, bytes });
        }
        let (layer, diff_id) = layer(&files, created, self.compression == Compression::Gzip)?;
        let config = ImageConfig {
            created: created.text(),
            architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            os: "linux",
            config: Process {
                user: self.user.as_ref().map_or(USER, |user| &user.0),
                env: self.environment.iter().map(|Pair { key, value }| format!("{key}={value}")).collect(),
                entrypoint,
                cmd: &self.args,
            },
            rootfs: RootFs { kind: "layers", diff_ids: [diff_id] },
        };
        let config = Blob::json("application/vnd.oci.image.config.v1+json", &config)?;
        Ok(Manifest { config, layers: vec![layer], annotations: self.annotations(created)? })
    }

    /// The component as <https://tag-runtime.cncf.io/wgs/wasm/deliverables/wasm-oci-artifact/> has it.
    fn artifact(&self, component: Vec<u8>, created: &Created) -> Result<Manifest> {
        let interfaces = Interfaces::of(&component)?;
        let layer = Blob::new("application/wasm", component);
        // The name of the file that tools make of it.
        let layer = layer.annotated("org.opencontainers.image.title", &self.file_name("wasm")?);
        let config = WasmConfig {
            created: created.text(),
            architecture: "wasm",
            os: "wasip2",
            layer_digests: [layer.digest()],
            component: WasmComponent {
                exports: interfaces.exports,
                imports: interfaces.imports,
                target: "mailroom:triage/triage@0.1.0",
            },
        };
        let config = Blob::json("application/vnd.wasm.config.v0+json", &config)?;
        Ok(Manifest { config, layers: vec![layer], annotations: self.annotations(created)? })
    }

    /// The component's file name with another extension.
    fn file_name(&self, extension: &str) -> Result<String> {
        let name = self.component.with_extension(extension);
        let name = name.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        name.with_context(|| format!("{}: its name is no UTF-8", self.component.display()))
    }

    fn annotations(&self, created: &Created) -> Result<BTreeMap<String, String>> {
        let title = self.file_name("")?;
        let own = [("created", created.text()), ("title", &title), ("version", &self.name.tag)];
        let own = own.map(|(key, value)| (format!("org.opencontainers.image.{key}"), value.to_owned()));
        let given = self.annotations.iter().map(|Pair { key, value }| (key.clone(), value.clone()));
        Ok(own.into_iter().chain(given).collect())
    }
}

/// Where the image goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Tar,
    Folder,
    StandardOutput,
}

impl Target {
    fn of(output: &Path) -> Result<Self> {
        match output.to_string_lossy() {
            output if output == "-" => {
                ensure!(!std::io::stdout().is_terminal(), "--output -: a terminal is no place for an image; pipe it");
                Ok(Self::StandardOutput)
            }
            output if output.ends_with(".tar") => Ok(Self::Tar),
            output if output.ends_with('/') => Ok(Self::Folder),
            output => bail!("output {output}: ends neither in .tar nor, for a folder, in /"),
        }
    }
}

/// The time that the image says it was made at.
fn created() -> Result<Created> {
    let Some(seconds) = std::env::var_os("SOURCE_DATE_EPOCH") else { return Created::at(0) };
    let seconds = seconds.to_string_lossy();
    let parsed = seconds.parse().context("takes seconds since 1970").and_then(Created::at);
    parsed.with_context(|| format!("SOURCE_DATE_EPOCH={seconds}"))
}

/// Links the component and makes an instance, as `host run` does at its start.
fn check_guest(path: &Path, component: &[u8]) -> Result<()> {
    let pool = Pools::new(&WIDEST, 1)?.of_shard(0)?;
    let loaded = Arc::new(from_bytes(pool.engine(), path, component)?);
    let guest = Guest::new(pool, loaded, &Grants::all())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(guest.try_out())
}

/// The host without a compiler, where it is beside this executable; else this executable.
fn beside() -> Result<PathBuf> {
    let this = std::env::current_exe().context("find this executable")?;
    let other = this.with_file_name("mailroom-host");
    Ok(if other.is_file() { other } else { this })
}

#[derive(Serialize)]
struct ImageConfig<'a> {
    created: &'a str,
    architecture: &'static str,
    os: &'static str,
    config: Process<'a>,
    rootfs: RootFs,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Process<'a> {
    user: &'a str,
    env: Vec<String>,
    entrypoint: Vec<String>,
    cmd: &'a [String],
}

#[derive(Serialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: [String; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WasmConfig<'a> {
    created: &'a str,
    architecture: &'static str,
    os: &'static str,
    layer_digests: [String; 1],
    component: WasmComponent,
}

#[derive(Serialize)]
struct WasmComponent {
    exports: Vec<String>,
    imports: Vec<String>,
    target: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        for good in ["0", "65532", "65532:65532", "1:0"] {
            good.parse::<User>().expect(good);
        }
        for bad in ["", ":", "nobody", "1:users", "1:2:3", "-1", "1:", "4294967296"] {
            bad.parse::<User>().expect_err(bad);
        }
    }

    #[test]
    fn pairs_have_a_name() {
        let pair: Pair = "A=b=c\nd".parse().expect("a pair");
        assert_eq!((&*pair.key, &*pair.value), ("A", "b=c\nd"));
        assert_eq!("A=".parse::<Pair>().expect("an empty value").value, "");
        for bad in ["", "A", "=b"] {
            bad.parse::<Pair>().expect_err(bad);
        }
    }

    #[test]
    fn the_output_says_what_is_written() {
        for (output, target) in
            [("triage.tar", Some(Target::Tar)), ("out/", Some(Target::Folder)), ("out", None), ("a.tar.gz", None)]
        {
            assert_eq!(Target::of(Path::new(output)).ok(), target, "{output}");
        }
    }
}
