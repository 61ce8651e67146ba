//! Hosts that share a consumer, each behind a network of its own, and all that may happen to them and their server.

use crate::bed::{Bed, SOON};
use crate::prelude::*;
use crate::proxy::Proxy;

/// Hosts on one consumer, and their server.
#[derive(Debug)]
pub struct Fleet {
    /// The server and what is on it.
    pub bed: Bed,
    hosts: Vec<Member>,
    provision: Vec<String>,
    args: Vec<String>,
    past: Vec<String>,
    is_quiet: bool,
}

/// A host and the network between it and the server.
#[derive(Debug)]
struct Member {
    host: Host,
    proxy: Proxy,
}

/// What may happen, to the host of a number or to the server, and how it is mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A host is killed (SIGKILL); another one is started.
    HostKilled(usize),
    /// A host stands still (SIGSTOP); it goes on.
    HostFrozen(usize),
    /// Nothing passes between a host and the server, and neither is told; all passes again.
    Cut(usize),
    /// A host's connections end at once.
    Reset(usize),
    /// What passes between a host and the server takes [`LATENCY`] each way.
    Slow(usize),
    /// The server is killed (SIGKILL); it is started again with what it has on its disk.
    ServerKilled,
    /// The server stands still (SIGSTOP); it goes on.
    ServerFrozen,
    /// The consumer is deleted; it is made again.
    ConsumerDeleted,
    /// The stream of verdicts takes none; it does again. (Making it full is no fault for a busy one: the server would
    /// delete what came between the look at its size and the limit.)
    VerdictsRefused,
}

/// The latency of a slow network, each way.
pub const LATENCY: Duration = Duration::from_millis(50);

impl Fleet {
    /// Starts a server and hosts that run the guest `actor`, with arguments for `host provision` and `host run`.
    ///
    /// # Errors
    /// When one of them does not become ready.
    pub async fn start(provision: &[&str], hosts: usize, args: &[&str]) -> Result<Self> {
        Self::on(Bed::provisioned(provision).await?, provision, hosts, args).await
    }

    /// Starts hosts on a server that was made with these arguments for `host provision`.
    ///
    /// # Errors
    /// As [`Fleet::start`].
    pub async fn on(bed: Bed, provision: &[&str], hosts: usize, args: &[&str]) -> Result<Self> {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let (hosts_so_far, past) = (Vec::new(), Vec::new());
        let (provision, args) = (words(provision), words(args));
        let mut fleet = Self { bed, hosts: hosts_so_far, provision, args, past, is_quiet: false };
        for _ in 0..hosts {
            let proxy = Proxy::to(fleet.bed.server.url()).await?;
            let host = fleet.host(&proxy).await?;
            fleet.hosts.push(Member { host, proxy });
        }
        fleet.until_ready().await?;
        Ok(fleet)
    }

    /// A host behind `proxy`, which may not be ready yet.
    async fn host(&self, proxy: &Proxy) -> Result<Host> {
        Host::on(proxy.url()).component(tools::component("actor")?).args(&self.args).start().await
    }

    /// The host of a number.
    pub fn member(&mut self, number: usize) -> &mut Host {
        &mut self.hosts[number].host
    }

    /// How many hosts there are.
    pub fn size(&self) -> usize {
        self.hosts.len()
    }

    /// Waits until every host is ready.
    ///
    /// # Errors
    /// When one is not after [`SOON`].
    pub async fn until_ready(&self) -> Result<()> {
        for member in &self.hosts {
            member.host.until_ready(SOON).await?;
        }
        Ok(())
    }

    /// Waits until a host holds at least so many messages.
    ///
    /// # Errors
    /// When it holds fewer after [`SOON`].
    pub async fn until_holds(&self, host: usize, messages: f64) -> Result<()> {
        self.until_held(host, |held| *held >= messages).await
    }

    /// Waits until no host has a message in its hands.
    ///
    /// # Errors
    /// When one still has after [`SOON`].
    pub async fn until_idle(&self) -> Result<()> {
        for host in 0..self.hosts.len() {
            self.until_held(host, |held| *held == 0.0).await?;
        }
        Ok(())
    }

    async fn until_held(&self, host: usize, wanted: impl Fn(&f64) -> bool) -> Result<()> {
        let look = async || self.hosts[host].host.metrics().await?.get("mailroom_in_flight", &[]).context("in flight");
        eventually(SOON, &format!("the messages that host {host} holds"), look, wanted).await.map(drop)
    }

    /// Lets a fault begin.
    ///
    /// # Errors
    /// When it cannot.
    pub async fn begin(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::HostKilled(host) => self.hosts[host].host.kill(),
            Fault::HostFrozen(host) => self.hosts[host].host.signal(Signal::STOP)?,
            Fault::Cut(host) => self.hosts[host].proxy.cut(),
            Fault::Reset(host) => self.hosts[host].proxy.reset(),
            Fault::Slow(host) => self.hosts[host].proxy.slow(LATENCY),
            Fault::ServerKilled => self.bed.server.kill(),
            Fault::ServerFrozen => self.bed.server.process().signal(Signal::STOP)?,
            Fault::ConsumerDeleted => {
                self.bed.jetstream.get_stream(streams::MAIL).await?.delete_consumer("triage").await?;
            }
            Fault::VerdictsRefused => self.verdicts_come_by("verdicts.elsewhere.>").await?,
        }
        Ok(())
    }

    /// Mends what began; whether all goes on is another question.
    ///
    /// # Errors
    /// When it cannot be mended.
    pub async fn end(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::HostKilled(host) => self.replace(host).await?,
            Fault::HostFrozen(host) => self.hosts[host].host.signal(Signal::CONT)?,
            Fault::Cut(host) | Fault::Slow(host) => self.hosts[host].proxy.heal(),
            Fault::Reset(_) => {}
            Fault::ServerKilled => {
                self.past.extend(log_of("nats-server", self.bed.server.process()));
                self.bed.server.restart().await?;
                self.hush();
                self.answers().await?;
            }
            Fault::ServerFrozen => {
                self.bed.server.process().signal(Signal::CONT)?;
                self.answers().await?;
            }
            Fault::ConsumerDeleted => {
                let args: Vec<&str> = self.provision.iter().map(String::as_str).collect();
                self.bed.provision(&args).await?;
            }
            Fault::VerdictsRefused => self.verdicts_come_by("verdict.>").await?,
        }
        Ok(())
    }

    /// Starts a host again that has ended by itself, as a supervisor does: one that finds no consumer at its start.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn supervise(&mut self, host: usize) -> Result<()> {
        if self.member(host).process().is_running()? { Ok(()) } else { self.replace(host).await }
    }

    /// Starts another host in the place of one that has ended.
    async fn replace(&mut self, host: usize) -> Result<()> {
        let new = self.host(&self.hosts[host].proxy).await?;
        self.past.extend(log_of(&format!("host {host}"), self.hosts[host].host.process()));
        self.hosts[host].host = new;
        self.hush();
        Ok(())
    }

    /// Waits until the connection of the bed works again.
    async fn answers(&self) -> Result<()> {
        let look = async || streams::outcomes(&self.bed.jetstream).await;
        eventually(SOON, "the server answers again", look, |_| true).await.map(drop)
    }

    /// Lets the stream of verdicts take this subject, and no other.
    async fn verdicts_come_by(&self, subject: &str) -> Result<()> {
        let mut stream = self.bed.jetstream.get_stream(streams::VERDICTS).await?;
        let mut config = stream.info().await?.config.clone();
        config.subjects = vec![subject.to_owned()];
        self.bed.jetstream.update_stream(&config).await?;
        Ok(())
    }

    /// Keeps the logs from being printed when the processes end.
    pub fn quiet(&mut self) {
        self.is_quiet = true;
        self.hush();
    }

    fn hush(&mut self) {
        if self.is_quiet {
            self.hosts.iter_mut().for_each(|member| member.host.process().quiet());
            self.bed.server.process().quiet();
        }
    }

    /// What the hosts and the server have logged, those that are gone first.
    pub fn log(&mut self) -> Vec<String> {
        let mut lines = self.past.clone();
        for (number, member) in self.hosts.iter_mut().enumerate() {
            lines.extend(log_of(&format!("host {number}"), member.host.process()));
        }
        lines.extend(log_of("nats-server", self.bed.server.process()));
        lines
    }
}

/// The log of a process, its lines marked with its name and id.
fn log_of(name: &str, process: &Process) -> Vec<String> {
    let id = process.id();
    process.lines().into_iter().map(|line| format!("{name} ({id}): {line}")).collect()
}
