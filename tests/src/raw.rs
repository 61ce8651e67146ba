//! NATS by hand: messages that no client library would send.

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The server answers a PING within this time.
const DEADLINE: Duration = Duration::from_secs(30);

/// A connection that writes what it is told, byte by byte.
#[derive(Debug)]
pub struct RawClient {
    connection: BufReader<TcpStream>,
}

impl RawClient {
    /// Connects to `nats://HOST:PORT`, with `USER:PASSWORD@` before it or without a login.
    ///
    /// # Errors
    /// When there is no server or it wants more.
    pub async fn connect(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("nats://").context("only nats:// is spoken here")?;
        let (login, address) = rest.split_once('@').unwrap_or(("", rest));
        let connection = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        // Otherwise what is published may wait for the server to confirm what came before.
        connection.set_nodelay(true)?;
        let mut client = Self { connection: BufReader::new(connection) };
        let mut options = json!({ "verbose": false, "pedantic": false, "headers": true, "no_responders": true });
        if let Some((user, password)) = login.split_once(':') {
            options["user"] = user.into();
            options["pass"] = password.into();
        }
        client.connection.write_all(format!("CONNECT {options}\r\n").as_bytes()).await?;
        client.flush().await?;
        Ok(client)
    }

    /// Publishes without waiting; with `headers` as the whole header block, version line and final empty line
    /// included.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn publish(&mut self, subject: &[u8], headers: Option<&[u8]>, payload: &[u8]) -> Result<()> {
        let lengths = match headers {
            Some(headers) => format!(" {} {}\r\n", headers.len(), headers.len() + payload.len()),
            None => format!(" {}\r\n", payload.len()),
        };
        let verb: &[u8] = if headers.is_some() { b"HPUB " } else { b"PUB " };
        let pieces = [verb, subject, lengths.as_bytes(), headers.unwrap_or_default(), payload, b"\r\n"];
        Ok(self.connection.write_all(&pieces.concat()).await?)
    }

    /// Asks for what is published on `subject`; nobody reads it.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn subscribe(&mut self, subject: &str) -> Result<()> {
        Ok(self.connection.write_all(format!("SUB {subject} 1\r\n").as_bytes()).await?)
    }

    /// Waits until the server has taken everything before.
    ///
    /// # Errors
    /// When it refuses something of it.
    pub async fn flush(&mut self) -> Result<()> {
        self.connection.write_all(b"PING\r\n").await?;
        let pong = async {
            let mut line = String::new();
            loop {
                line.clear();
                if self.connection.read_line(&mut line).await? == 0 {
                    bail!("the server closed the connection");
                }
                match line.trim_end() {
                    "PONG" => return Ok(()),
                    error if error.starts_with("-ERR") => bail!("the server says {error}"),
                    _ => {}
                }
            }
        };
        timeout(DEADLINE, pong).await.context("no PONG")?
    }
}
