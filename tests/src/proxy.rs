//! A network between a host and its server that can be cut, slow, or reset connections.

use anyhow::{Context as _, Result};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

/// A port that leads to a server. All goes through unhindered, until it is told otherwise; dropping it ends it and its
/// connections.
#[derive(Debug)]
pub struct Proxy {
    url: String,
    network: watch::Sender<Network>,
    accepting: AbortHandle,
}

/// How the network is.
#[derive(Clone, Copy, Debug, Default)]
struct Network {
    /// Nothing goes through, in either direction, and nobody is told.
    is_cut: bool,
    /// How long everything takes, each way.
    delay: Duration,
    /// Counts the connections' ends: those of an earlier number are reset.
    resets: u64,
}

/// Most bytes that are moved at a time, and most pieces under way in one direction of a connection.
const PIECE_BYTES: usize = 64 << 10;
const PIECES: usize = 1024;

impl Proxy {
    /// A port that leads to `server`, a URL.
    ///
    /// # Errors
    /// When there is no port left, or no address in the URL.
    pub async fn to(server: &str) -> Result<Self> {
        let (scheme, target) = server.split_once("://").with_context(|| format!("{server}: no address in it"))?;
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listen for the proxy")?;
        let url = format!("{scheme}://{}", listener.local_addr()?);
        let network = watch::Sender::new(Network::default());
        let accepting = tokio::spawn(accept(listener, target.to_owned(), network.clone())).abort_handle();
        Ok(Self { url, network, accepting })
    }

    /// Where clients connect instead.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Stops everything in both directions. Connections stay open, as when a cable is pulled; new ones come about, but
    /// nobody answers on them.
    pub fn cut(&self) {
        self.network.send_modify(|network| network.is_cut = true);
    }

    /// Lets everything take so long, each way.
    pub fn slow(&self, delay: Duration) {
        self.network.send_modify(|network| network.delay = delay);
    }

    /// Ends all connections at once, on both sides.
    pub fn reset(&self) {
        self.network.send_modify(|network| network.resets += 1);
    }

    /// Takes back [`Proxy::cut`] and [`Proxy::slow`]; what was under way goes on.
    pub fn heal(&self) {
        self.network.send_modify(|network| (network.is_cut, network.delay) = (false, Duration::ZERO));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Serves connections until it is dropped.
async fn accept(listener: TcpListener, target: String, network: watch::Sender<Network>) {
    let mut connections = JoinSet::new();
    loop {
        // Fails for single connections only, which are gone then.
        if let Ok((client, _)) = listener.accept().await {
            connections.spawn(connect(client, target.clone(), network.subscribe()));
        }
        while connections.try_join_next().is_some() {}
    }
}

/// Moves what comes on a connection, either way, until both sides have ended it or it is reset. Fails when one side
/// breaks off, which ends the other side as well.
async fn connect(mut client: TcpStream, target: String, mut network: watch::Receiver<Network>) -> io::Result<()> {
    let resets = network.borrow().resets;
    let mut server = TcpStream::connect(target).await?;
    for side in [&client, &server] {
        side.set_nodelay(true)?;
    }
    let is_reset = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let there = carry(from_client, to_server, network.clone());
        let back = carry(from_server, to_client, network.clone());
        tokio::select! {
            ended = async { tokio::try_join!(there, back) } => ended.map(|_| false)?,
            _ = network.wait_for(|network| network.resets != resets) => true,
        }
    };
    if is_reset {
        client.set_zero_linger()?;
        server.set_zero_linger()?;
    }
    Ok(())
}

/// Moves bytes from one side to the other until the first has ended.
async fn carry(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut network: watch::Receiver<Network>) -> io::Result<()> {
    let (sender, mut under_way) = mpsc::channel(PIECES);
    let delays = network.clone();
    let read = async move {
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            let bytes = from.read(&mut buffer).await?;
            let due = Instant::now() + delays.borrow().delay;
            // An empty piece is the end.
            if sender.send((due, buffer[..bytes].to_vec())).await.is_err() || bytes == 0 {
                return Ok(());
            }
        }
    };
    let write = async {
        while let Some((due, piece)) = under_way.recv().await {
            sleep_until(due).await;
            // Fails when the proxy is gone, and this with it.
            _ = network.wait_for(|network| !network.is_cut).await;
            to.write_all(&piece).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(drop)
}
