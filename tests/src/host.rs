use crate::command::settings_of_ours;
use crate::process::Process;
use crate::wait::eventually;
use crate::{http, tools};
use anyhow::{Context as _, Result};
use rustix::process::Signal;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

/// A `host run` process with an admin endpoint on a free port. Killed when dropped.
#[derive(Debug)]
pub struct Host {
    process: Process,
    admin: String,
}

/// What a [`Host`] is started with.
#[derive(Clone, Debug)]
pub struct HostBuilder {
    server: String,
    native: bool,
    under: Vec<OsString>,
    executable: Option<PathBuf>,
    component: Option<PathBuf>,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

/// The time from start to the line that names the admin endpoint; a component may be compiled in it.
const START_DEADLINE: Duration = Duration::from_secs(60);

impl Host {
    /// Prepares `host run --server SERVER --listen 127.0.0.1:0` with the component `triage`.
    pub fn on(server: &str) -> HostBuilder {
        HostBuilder {
            server: server.to_owned(),
            native: false,
            under: Vec::new(),
            executable: None,
            component: None,
            args: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Prepares the native handler, which takes the same arguments.
    pub fn native(server: &str) -> HostBuilder {
        HostBuilder { native: true, ..Self::on(server) }
    }

    /// The admin endpoint, as `http://127.0.0.1:PORT`.
    pub fn admin(&self) -> &str {
        &self.admin
    }

    /// What `/metrics` says now.
    ///
    /// # Errors
    /// When the admin endpoint does not answer with them.
    pub async fn metrics(&self) -> Result<Metrics> {
        let response = http::get(&format!("{}/metrics", self.admin)).await?;
        anyhow::ensure!(response.status == 200, "GET {}/metrics: {response:?}", self.admin);
        Metrics::parse(&response.body)
    }

    /// Status code and body of the readiness endpoint.
    ///
    /// # Errors
    /// When the admin endpoint does not answer.
    pub async fn ready(&self) -> Result<(u16, String)> {
        let response = http::get(&format!("{}/readyz", self.admin)).await?;
        Ok((response.status, response.body))
    }

    /// Waits until the host says that it is ready.
    ///
    /// # Errors
    /// When it does not within `deadline`; the error names its last answer.
    pub async fn until_ready(&self, deadline: Duration) -> Result<()> {
        let ready = eventually(deadline, "the host is ready", async || self.ready().await, |answer| answer.0 == 200);
        ready.await.map(drop)
    }

    /// The process, for its log lines and its id.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for a log line that `wanted` accepts, those already printed included.
    ///
    /// # Errors
    /// As [`Process::wait_for_line`].
    pub async fn wait_for_line(&self, deadline: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.process.wait_for_line(deadline, wanted).await
    }

    /// Sends a signal to the host.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Waits until the host ends by itself.
    ///
    /// # Errors
    /// When it still runs at the deadline.
    pub async fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.process.wait(deadline).await
    }

    /// Stops it as Kubernetes does, with SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// When it still runs at the deadline.
    pub async fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(deadline).await
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

impl HostBuilder {
    /// Runs this file instead of the component `triage`.
    #[must_use]
    pub fn component(mut self, file: impl AsRef<Path>) -> Self {
        self.component = Some(file.as_ref().to_owned());
        self
    }

    /// Starts it with this command, which takes the executable and its arguments as further words.
    #[must_use]
    pub fn under<A: AsRef<OsStr>>(mut self, command: impl IntoIterator<Item = A>) -> Self {
        self.under = command.into_iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// Starts this executable, one of another build, instead of the usual one.
    #[must_use]
    pub fn executable(mut self, file: impl AsRef<Path>) -> Self {
        self.executable = Some(file.as_ref().to_owned());
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(self, arg: impl AsRef<OsStr>) -> Self {
        self.args([arg])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable. Of the caller's own, `MAILROOM_…` and `RUST_LOG` do not reach the host.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts the host and waits until its admin endpoint listens; whether it is ready is another question.
    ///
    /// # Errors
    /// When the executable or the component is missing, or the host ends before; the error quotes its last line.
    pub async fn start(self) -> Result<Host> {
        let process = self.spawn()?;
        let line = process.wait_for_line(START_DEADLINE, |line| admin_address(line).is_some()).await?;
        let admin = admin_address(&line).context("the line that was just matched")?;
        Ok(Host { process, admin })
    }

    /// Starts the process only: for a host that is expected to end by itself.
    ///
    /// # Errors
    /// When the executable or the component is missing.
    pub fn spawn(self) -> Result<Process> {
        let usual = || if self.native { tools::native_handler() } else { tools::host() };
        let executable = self.executable.map_or_else(usual, Ok)?;
        let mut words = self.under.into_iter().chain([executable.into()]);
        let mut command = Command::new(words.next().context("an executable")?);
        command.args(words);
        for variable in settings_of_ours() {
            command.env_remove(variable);
        }
        command.envs(tools::cache());
        if !self.native {
            let component = self.component.map_or_else(|| tools::component("triage"), Ok)?;
            command.arg("run").arg("--component").arg(component);
        }
        command.args(["--server", &self.server, "--listen", "127.0.0.1:0"]).args(self.args).envs(self.environment);
        Process::spawn("host", command)
    }
}

/// The address in the log line about the admin endpoint, in either log format.
fn admin_address(line: &str) -> Option<String> {
    if !line.contains("admin endpoint") {
        return None;
    }
    let url = &line[line.find("http://127.0.0.1:")?..];
    let port_at = "http://127.0.0.1:".len();
    let digits = url[port_at..].bytes().take_while(u8::is_ascii_digit).count();
    (digits > 0).then(|| url[..port_at + digits].to_owned())
}

/// Samples in Prometheus' text format.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Metrics {
    /// Reads the text format; label values may hold escapes.
    ///
    /// # Errors
    /// When a line is no sample.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines.map(|line| sample(line).with_context(|| format!("no metric sample: {line:?}")));
        Ok(Self { samples: samples.collect::<Result<_>>()? })
    }

    /// The sum of all samples called `name` that carry at least these labels; `None` when there is none.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let carries = |sample: &&Sample| {
            sample.name == name
                && labels.iter().all(|&(key, value)| sample.labels.iter().any(|l| l.0 == key && l.1 == value))
        };
        self.samples.iter().filter(carries).map(|sample| sample.value).reduce(|sum, value| sum + value)
    }

    /// The mean of a histogram or summary over all its labels; `None` when it has seen nothing.
    pub fn mean(&self, name: &str) -> Option<f64> {
        let count = self.get(&format!("{name}_count"), &[]).filter(|&count| count > 0.0)?;
        Some(self.get(&format!("{name}_sum"), &[])? / count)
    }

    /// The names of all metrics, sorted, each once.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.samples.iter().map(|sample| sample.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.push((key.to_owned(), value));
            rest = after;
        }
    }
    // A timestamp may follow the value.
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// A label value up to its closing quote, unescaped, and what follows the quote.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}
