//! What lies on a node: executables, containerd's configuration, and who is in charge of them.

use crate::configuration::{self, Changed};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs::{self, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::NamedTempFile;

/// What a node has beside each other: the shim, and what it starts.
const EXECUTABLES: [&str; 3] = ["containerd-shim-mailroom-v1", "mailroom-host", "mailroom-compiler"];

/// Where containerd's own packages have its configuration.
const CONFIGURATION: &str = "/etc/containerd/config.toml";

/// Where k3s writes it at every start, and looks for templates of it.
const K3S: &str = "/var/lib/rancher/k3s/agent/etc/containerd";

/// What tells a node of k3s that has no control plane.
const K3S_AGENT: &str = "/etc/systemd/system/k3s-agent.service";

/// Who has installed last.
const OWNER: &str = "/var/lib/mailroom/node-owner";

/// What the shim keeps, unless its options say otherwise.
const CACHE: &str = "/var/lib/mailroom/compiled";

/// The executables as they come with this one.
pub struct Executables(Vec<(&'static str, Vec<u8>)>);

impl Executables {
    /// Reads those that lie beside this one.
    ///
    /// # Errors
    /// When one is missing.
    pub fn read() -> Result<Self> {
        let own = std::env::current_exe().context("find this executable")?;
        let folder = own.parent().context("an executable lies in a folder")?;
        let read = |name: &'static str| {
            let file = folder.join(name);
            Ok((name, fs::read(&file).with_context(|| format!("read {}", file.display()))?))
        };
        Ok(Self(EXECUTABLES.into_iter().map(read).collect::<Result<_>>()?))
    }
}

/// Places on a node.
pub struct Installation {
    bin: PathBuf,
    configuration: Configuration,
    options: Option<String>,
    restart: Vec<String>,
    owner: Option<String>,
}

/// What is edited.
enum Configuration {
    /// `config.toml`.
    Plain(PathBuf),
    /// A template of k3s, and the version of what k3s makes of it.
    Template(PathBuf, i64),
}

impl Installation {
    /// Looks what kind of node this is, as far as it is not told.
    pub fn new(
        bin: PathBuf,
        config: Option<PathBuf>,
        options: Option<String>,
        restart: Option<String>,
        owner: Option<String>,
    ) -> Self {
        let (configuration, service) = match config {
            Some(file) => (Configuration::Plain(file), "containerd"),
            None => match fs::read_to_string(Path::new(K3S).join("config.toml")) {
                Ok(text) => {
                    let version = configuration::version(&text).unwrap_or(2);
                    let file = if version == 2 { "config.toml.tmpl" } else { "config-v3.toml.tmpl" };
                    let service = if Path::new(K3S_AGENT).exists() { "k3s-agent" } else { "k3s" };
                    (Configuration::Template(Path::new(K3S).join(file), version), service)
                }
                Err(_) => (Configuration::Plain(CONFIGURATION.into()), "containerd"),
            },
        };
        let restart = restart.unwrap_or_else(|| format!("systemctl restart {service}"));
        let restart = restart.split_whitespace().map(str::to_owned).collect();
        Self { bin, configuration, options, restart, owner }
    }

    /// What is where, for people.
    pub fn describe(&self) -> String {
        format!("the shim in {}, the runtime in {}", self.bin.display(), self.file().display())
    }

    /// Places the executables and adds the runtime. containerd is restarted only when its configuration has changed;
    /// when it does not come back, the configuration is again what it was.
    ///
    /// # Errors
    /// When a file cannot be written, the configuration is not understood, or containerd does not come back.
    pub fn install(&self, executables: Executables) -> Result<()> {
        fs::create_dir_all(&self.bin).with_context(|| format!("make {}", self.bin.display()))?;
        for (name, content) in &executables.0 {
            let file = self.bin.join(name);
            if fs::read(&file).is_ok_and(|there| there == *content) {
                continue;
            }
            replace(&file, content, 0o755)?;
            println!("{}: placed", file.display());
        }
        if let Some(owner) = &self.owner {
            let folder = Path::new(OWNER).parent().context("a folder")?;
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
            replace(Path::new(OWNER), owner.as_bytes(), 0o644)?;
        }
        let options = self.options.as_deref();
        self.change(|text| match &self.configuration {
            Configuration::Plain(_) => configuration::add(text, options),
            Configuration::Template(_, version) => configuration::add_to_template(text, *version, options),
        })
    }

    /// Takes the runtime out of the configuration and removes the executables, unless another owner has installed since.
    ///
    /// # Errors
    /// As [`Installation::install`].
    pub fn remove(&self) -> Result<()> {
        let last = read(Path::new(OWNER))?;
        if let (Some(own), Some(last)) = (&self.owner, &last)
            && own != last
        {
            println!("left to {last}, which has installed since");
            return Ok(());
        }
        self.change(|text| match (&self.configuration, text) {
            (_, None) => Ok(Changed::No),
            (Configuration::Plain(_), Some(text)) => configuration::remove(text),
            (Configuration::Template(..), Some(text)) => Ok(configuration::remove_from_template(text)),
        })?;
        for file in EXECUTABLES.map(|name| self.bin.join(name)).into_iter().chain([OWNER.into()]) {
            gone(fs::remove_file(&file)).with_context(|| format!("remove {}", file.display()))?;
        }
        if self.options.is_none() {
            gone(fs::remove_dir_all(CACHE)).with_context(|| format!("remove {CACHE}"))?;
        }
        println!("removed: {}", self.describe());
        Ok(())
    }

    fn file(&self) -> &Path {
        match &self.configuration {
            Configuration::Plain(file) | Configuration::Template(file, _) => file,
        }
    }

    /// Changes the configuration, and restarts containerd if there is a change.
    fn change(&self, change: impl FnOnce(Option<&str>) -> Result<Changed>) -> Result<()> {
        let file = self.file();
        let before = read(file)?;
        let after = match change(before.as_deref()).with_context(|| file.display().to_string())? {
            Changed::No => {
                println!("{}: as it should be", file.display());
                return Ok(());
            }
            Changed::To(text) => Some(text),
            Changed::Gone => None,
        };
        put(file, after.as_deref())?;
        println!("{}: changed; {}", file.display(), self.restart.join(" "));
        let Err(err) = self.restart() else { return Ok(()) };
        put(file, before.as_deref())?;
        match self.restart() {
            Ok(()) => bail!("{err:#}; {} is what it was again", file.display()),
            Err(again) => bail!("{err:#}; nor with {} as it was: {again:#}", file.display()),
        }
    }

    fn restart(&self) -> Result<()> {
        let (program, args) = self.restart.split_first().context("nothing restarts containerd")?;
        // Not looked at whether this root is that of the first process: it is, but for who may see it.
        let status = Command::new(program).args(args).env("SYSTEMD_IGNORE_CHROOT", "1").status();
        let status = status.with_context(|| format!("start {program}"))?;
        ensure!(status.success(), "{} ended with {status}", self.restart.join(" "));
        Ok(())
    }
}

/// The text of a file, if there is one.
fn read(file: &Path) -> Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(err) if err.kind() == ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err).with_context(|| format!("read {}", file.display())),
    }
}

/// Gives a file that text, or none at all.
fn put(file: &Path, text: Option<&str>) -> Result<()> {
    let Some(text) = text else {
        return gone(fs::remove_file(file)).with_context(|| format!("remove {}", file.display()));
    };
    // Where it is a link, what it leads to is written.
    let file = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let mode = fs::metadata(&file).map_or(0o644, |metadata| metadata.permissions().mode() & 0o777);
    let folder = file.parent().context("a file in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    replace(&file, text.as_bytes(), mode)
}

/// Writes a file anew: nobody sees half of it, and who runs the old one goes on.
fn replace(file: &Path, content: &[u8], mode: u32) -> Result<()> {
    let write = || -> Result<()> {
        let mut part = NamedTempFile::new_in(file.parent().context("a file in a folder")?)?;
        part.write_all(content)?;
        part.as_file().set_permissions(Permissions::from_mode(mode))?;
        part.as_file().sync_all()?;
        part.persist(file)?;
        Ok(())
    };
    write().with_context(|| format!("write {}", file.display()))
}

/// That there is nothing to be removed is fine.
fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(err) if err.kind() != ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}
