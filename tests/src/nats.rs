use crate::process::Process;
use crate::tools;
use crate::wait::eventually;
use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{Client, ConnectOptions, jetstream};
use rustix::process::Signal;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;

/// A private nats-server on free ports, of the loopback interface unless told otherwise. Dropping it ends the
/// server and removes its data.
#[derive(Debug)]
pub struct NatsServer {
    process: Process,
    folder: TempDir,
    settings: Settings,
    url: String,
    monitoring: String,
}

/// What differs from a plain server with JetStream.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether JetStream is on (it is by default).
    pub jetstream: bool,
    /// More lines of configuration, in nats-server's own language: `authorization { … }`, `tls { … }`,
    /// `max_payload: 1MB`.
    pub extra: String,
    /// The address to listen at: one that other machines do not reach.
    pub address: Ipv4Addr,
    /// Whether it is [`tools::new_nats_server`], and not what the machine has.
    pub new: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { jetstream: true, extra: String::new(), address: Ipv4Addr::LOCALHOST, new: false }
    }
}

/// A start takes some 40 ms; a machine that compiles beside it is slow.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// The server's configuration file in its folder.
const CONFIGURATION: &str = "nats-server.conf";

impl NatsServer {
    /// Starts a server with JetStream and nothing else, and waits until it answers.
    ///
    /// # Errors
    /// When there is no nats-server, or it does not answer; the error quotes its last line.
    pub async fn start() -> Result<Self> {
        Self::start_with(Settings::default()).await
    }

    /// The same with a server that is 2.12 or newer.
    ///
    /// # Errors
    /// As [`NatsServer::start`].
    pub async fn start_new() -> Result<Self> {
        Self::start_with(Settings { new: true, ..Settings::default() }).await
    }

    /// Starts a server with more configuration.
    ///
    /// # Errors
    /// As [`NatsServer::start`]; for a refused configuration the last line says why.
    pub async fn start_with(settings: Settings) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("mailroom-nats-").tempdir().context("make a temporary folder")?;
        let listen = format!("{}:-1", settings.address);
        let process = spawn(folder.path(), &settings, &listen, &listen)?;
        let mut server = Self { process, folder, settings, url: String::new(), monitoring: String::new() };
        server.answers().await?;
        Ok(server)
    }

    /// Where clients connect, as `nats://ADDRESS:PORT` (`tls://…` when the settings turn TLS on).
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The monitoring endpoint, as `http://ADDRESS:PORT`.
    pub fn monitoring(&self) -> &str {
        &self.monitoring
    }

    /// The server's folder; it is removed with the server.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process, for its log, its id and signals of other kinds.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends the server at once (SIGKILL), as a crash would. Its data and its ports are kept for [`NatsServer::restart`].
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops the server in good order and waits until it has ended. Its data and its ports are kept.
    ///
    /// # Errors
    /// When it still runs after 20 s.
    pub async fn stop(&mut self) -> Result<()> {
        if self.process.is_running()? {
            self.process.signal(Signal::TERM)?;
            self.process.wait(START_DEADLINE).await?;
        }
        Ok(())
    }

    /// Starts the server again on the same ports with the same data; a running one is stopped first.
    ///
    /// # Errors
    /// When it does not come back.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop().await?;
        let listen = address(&self.url)?.to_owned();
        let monitoring = address(&self.monitoring)?.to_owned();
        self.process = spawn(self.folder.path(), &self.settings, &listen, &monitoring)?;
        self.answers().await
    }

    /// The same, with JetStream or without it.
    ///
    /// # Errors
    /// As [`NatsServer::restart`].
    pub async fn restart_with(&mut self, jetstream: bool) -> Result<()> {
        self.settings.jetstream = jetstream;
        self.restart().await
    }

    /// Gives the running server other lines of configuration, which it takes up a moment later.
    ///
    /// # Errors
    /// When the file cannot be written, or the server does not run.
    pub fn reload(&mut self, extra: String) -> Result<()> {
        let file = self.folder.path().join(CONFIGURATION);
        let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        // The server takes no other addresses while it runs, not even those that it found for itself.
        let kept = text.strip_suffix(&self.settings.extra).context("the configuration has changed")?;
        std::fs::write(&file, format!("{kept}{extra}")).with_context(|| format!("write {}", file.display()))?;
        self.settings.extra = extra;
        self.process.signal(Signal::HUP)
    }

    /// A connection of its own.
    ///
    /// # Errors
    /// When the server refuses it, for one that wants credentials for instance: see [`NatsServer::client_with`].
    pub async fn client(&self) -> Result<Client> {
        self.client_with(ConnectOptions::new()).await
    }

    /// A connection with credentials, TLS and the like.
    ///
    /// # Errors
    /// When the server refuses it.
    pub async fn client_with(&self, options: ConnectOptions) -> Result<Client> {
        options.connect(&self.url).await.with_context(|| format!("connect to NATS at {}", self.url))
    }

    /// A JetStream context on a connection of its own.
    ///
    /// # Errors
    /// As [`NatsServer::client`].
    pub async fn jetstream(&self) -> Result<jetstream::Context> {
        Ok(jetstream::new(self.client().await?))
    }

    /// Waits until the server takes connections with what it was asked for, and learns its addresses.
    async fn answers(&mut self) -> Result<()> {
        let ports = self.folder.path().join(format!("nats-server_{}.ports", self.process.id()));
        let jetstream = self.settings.jetstream;
        let probe = async || {
            let text = std::fs::read(&ports).with_context(|| format!("read {}", ports.display()))?;
            let ports: Value = serde_json::from_slice(&text).context("the ports file is not complete")?;
            let url = ports["nats"][0].as_str().context("the ports file has no client address")?.to_owned();
            let monitoring = ports["monitoring"][0].as_str().context("the ports file has no monitoring address")?;
            let info = greeting(address(&url)?).await?;
            if info["jetstream"].as_bool().unwrap_or(false) != jetstream {
                bail!("JetStream is not in the wanted state: {info}");
            }
            Ok((url, monitoring.to_owned()))
        };
        // A server that refuses its configuration ends at once: no need to wait for the deadline then.
        let found = tokio::select! {
            found = eventually(START_DEADLINE, "nats-server answers", probe, |_| true) => found,
            last_line = self.process.wait_for_end() => Err(anyhow!("nats-server ended at once; {last_line}")),
        };
        (self.url, self.monitoring) = found?;
        Ok(())
    }
}

fn spawn(folder: &Path, settings: &Settings, listen: &str, monitoring: &str) -> Result<Process> {
    let mut text = format!("listen: \"{listen}\"\nhttp: \"{monitoring}\"\nports_file_dir: {:?}\n", folder);
    if settings.jetstream {
        text += &format!("jetstream {{ store_dir: {:?} }}\n", folder.join("store"));
    }
    text += &settings.extra;
    let file = folder.join(CONFIGURATION);
    std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    let mut command = Command::new(if settings.new { tools::new_nats_server()? } else { tools::nats_server()? });
    command.arg("--config").arg(file);
    Process::spawn("nats-server", command)
}

/// `HOST:PORT` of a URL.
fn address(url: &str) -> Result<&str> {
    let (_, address) = url.split_once("://").with_context(|| format!("{url}: no address in it"))?;
    Ok(address)
}

/// The INFO line that a NATS server opens every connection with, before credentials and TLS.
async fn greeting(address: &str) -> Result<Value> {
    let connection = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
    let mut line = String::new();
    BufReader::new(connection).read_line(&mut line).await?;
    let info = line.strip_prefix("INFO ").with_context(|| format!("{address} is no NATS server: {line:?}"))?;
    serde_json::from_str(info).context("read the server's INFO line")
}
