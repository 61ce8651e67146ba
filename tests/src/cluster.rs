//! Three servers that keep every stream three times.

use crate::bed::Bed;
use crate::prelude::*;
use async_nats::ConnectOptions;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};

/// A cluster of three servers on the loopback interface, provisioned with three copies of everything.
#[derive(Debug)]
pub struct Cluster {
    /// The streams, as any of the servers shows them, and the first server.
    pub bed: Bed,
    others: Vec<NatsServer>,
}

/// An election takes up to 10 seconds, and is repeated when nobody wins it; there is one for the cluster and each stream
/// and consumer, and the hosts notice each a little later.
const ELECTED: Duration = Duration::from_secs(90);

impl Cluster {
    /// Starts the servers and makes the streams, with further arguments for `host provision`.
    ///
    /// # Errors
    /// When they do not come together.
    pub async fn start(provision: &[&str]) -> Result<Self> {
        let routes: Vec<String> = free_ports(3).map(|port| format!("127.0.0.1:{port}")).collect();
        let all: Vec<String> = routes.iter().map(|route| format!("nats://{route}")).collect();
        let mut servers = Vec::new();
        for (number, route) in routes.iter().enumerate() {
            // Told of no others, its clients know those that they were given.
            let extra = format!(
                "server_name: n{number}\ncluster {{ name: tests, listen: {route:?}, no_advertise: true, routes: {all:?} }}\n"
            );
            servers.push(NatsServer::start_with(Settings { extra, ..Settings::default() }).await?);
        }
        let urls: Vec<&str> = servers.iter().map(NatsServer::url).collect();
        // A server that stands still is noticed soon.
        let options = ConnectOptions::new().ping_interval(Duration::from_secs(1));
        let client = options.connect(&urls[..]).await.with_context(|| format!("connect to {urls:?}"))?;
        let jetstream = async_nats::jetstream::new(client);
        let bed = Bed { server: servers.remove(0), jetstream, patience: ELECTED };
        let args = [provision, &["--replicas", "3"]].concat();
        eventually(ELECTED, "the cluster has formed", async || bed.provision(&args).await, |()| true).await?;
        Ok(Self { bed, others: servers })
    }

    /// Where clients connect: all of the servers, separated by commas.
    pub fn urls(&self) -> String {
        let urls = [&self.bed.server].into_iter().chain(&self.others).map(NatsServer::url);
        urls.collect::<Vec<_>>().join(",")
    }

    /// Waits until a stream has a leader other than `former`, and gives the server that it is.
    ///
    /// # Errors
    /// When there is none after [`Bed::patience`].
    pub async fn leader(&self, stream: &str, former: Option<usize>) -> Result<usize> {
        let look = async || {
            let stream = self.bed.jetstream.get_stream(stream).await?;
            let leader = stream.cached_info().cluster.as_ref().and_then(|cluster| cluster.leader.clone());
            let leader = leader.context("no leader")?;
            leader.trim_start_matches('n').parse::<usize>().context("the leader's name")
        };
        eventually(self.bed.patience, &format!("{stream} has another leader"), look, |leader| Some(*leader) != former)
            .await
    }

    /// The server of a number.
    pub fn server(&mut self, number: usize) -> &mut NatsServer {
        match number {
            0 => &mut self.bed.server,
            number => &mut self.others[number - 1],
        }
    }
}

/// Ports that nobody listens at, of those that the system gives to nobody who wants any: they are free until the servers
/// start.
fn free_ports(count: usize) -> impl Iterator<Item = u16> {
    let mut random = fastrand::Rng::new();
    let mut ports = BTreeSet::new();
    while ports.len() < count {
        let port = random.u16(20_000..30_000);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            ports.insert(port);
        }
    }
    ports.into_iter()
}
