//! `host scaler`, and who calls it.

use crate::bed::SOON;
use crate::command::settings_of_ours;
use crate::wait::eventually;
use crate::{Metrics, Process, http, tools};
use anyhow::{Context as _, Result};
use external_scaler::external_scaler_client::ExternalScalerClient;
use serde_json::Value;
use std::process::Command;
use tonic::transport::{Channel, Endpoint};

/// KEDA's side of the protocol.
pub type Client = ExternalScalerClient<Channel>;

/// A `host scaler` process on free ports. Killed when dropped.
#[derive(Debug)]
pub struct Scaler {
    process: Process,
    address: String,
    admin: String,
}

impl Scaler {
    /// Starts it with further arguments and waits until it listens; whether it is connected to NATS is another question.
    ///
    /// # Errors
    /// When the executable is missing, or it ends before; the error quotes its last line.
    pub async fn start(server: &str, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(tools::host()?);
        for variable in settings_of_ours() {
            command.env_remove(variable);
        }
        command.args(["scaler", "--server", server, "--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"]);
        command.args(args);
        let process = Process::spawn("host scaler", command)?;
        let said = async |what: &str, field: &str| -> Result<String> {
            let line = process.wait_for_line(SOON, |line| line.contains(what)).await?;
            let said: Value = serde_json::from_str(&line).with_context(|| format!("no JSON: {line}"))?;
            Ok(said[field].as_str().with_context(|| format!("no {field} in {line}"))?.to_owned())
        };
        let admin = said("admin endpoint", "url").await?;
        let address = said("scaler endpoint", "address").await?;
        Ok(Self { process, address, admin })
    }

    /// One that is connected to NATS, without further arguments.
    ///
    /// # Errors
    /// As [`Scaler::start`], and when it does not become ready.
    pub async fn ready(server: &str) -> Result<Self> {
        let scaler = Self::start(server, &[]).await?;
        scaler.until_ready(200).await?;
        Ok(scaler)
    }

    /// Waits until the readiness endpoint answers with this status.
    ///
    /// # Errors
    /// When it does not within [`SOON`].
    pub async fn until_ready(&self, status: u16) -> Result<()> {
        let url = format!("{}/readyz", self.admin);
        let ask = async || Ok(http::get(&url).await?.status);
        eventually(SOON, "the scaler's readiness", ask, |found| *found == status).await.map(drop)
    }

    /// A connection of its own, without TLS.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn client(&self) -> Result<Client> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))?;
        Ok(ExternalScalerClient::new(endpoint.connect().await?))
    }

    /// Where KEDA calls, as `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What `/metrics` says now.
    ///
    /// # Errors
    /// When the admin endpoint does not answer with them.
    pub async fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.metrics_text().await?)
    }

    /// The same as text.
    ///
    /// # Errors
    /// When the admin endpoint does not answer.
    pub async fn metrics_text(&self) -> Result<String> {
        Ok(http::get(&format!("{}/metrics", self.admin)).await?.body)
    }

    /// The process, for its log lines, signals and its end.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
