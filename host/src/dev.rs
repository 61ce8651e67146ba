//! A private nats-server with JetStream, for trying things out: `host run --dev`.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::Deserialize;
use std::env;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long the server may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the server may take to stop before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a starting or stopping server is looked at.
const POLL: Duration = Duration::from_millis(5);
/// Log lines that an error about a failed start carries.
const LOG_LINES: usize = 10;

/// Everything on loopback and on free ports. Paths are relative to the working directory, which is the server's own.
/// A payload of 32 MiB needs no change of `max_pending` (64 MiB by default).
const CONFIG: &str = r#"host: "127.0.0.1"
port: -1
http: "127.0.0.1:-1"
ports_file_dir: "."
max_payload: 33554432
jetstream { store_dir: "jetstream" }
"#;

/// A private nats-server on loopback; what it stored is gone when this is dropped.
///
/// It does not outlive this process, however that ends (on Linux), and does not get the terminal's Ctrl-C, so that
/// this process can finish its messages first.
#[derive(Debug)]
pub struct DevServer {
    url: String,
    monitoring_url: String,
    /// Dropped to make the keeper stop the server.
    stop: Option<Sender<()>>,
    keeper: Option<JoinHandle<()>>,
    // Last, so that the directory goes after the server has.
    _directory: tempfile::TempDir,
}

impl DevServer {
    /// Starts `executable`, or the `nats-server` on the PATH or where packages put it, and waits until it listens.
    ///
    /// May be called from any thread; blocks, at most ten seconds.
    ///
    /// # Errors
    /// No nats-server to be found, or one that does not start: then with the end of its log.
    pub fn start(executable: Option<&Path>) -> Result<Self> {
        let executable = match executable {
            Some(path) => path.to_owned(),
            None => find()?,
        };
        let directory = tempfile::Builder::new()
            .prefix("mailroom-nats-")
            .tempdir()
            .context("make a directory for the private nats-server")?;
        let config = directory.path().join("nats.conf");
        fs::write(&config, CONFIG).with_context(|| format!("write {}", config.display()))?;

        let (stop, stopped) = mpsc::channel();
        let (started, start) = mpsc::channel();
        let path = directory.path().to_owned();
        // The kernel's parent-death signal comes when the *thread* that made the child ends, so the thread that
        // makes it stays until the server is gone.
        let keeper = thread::Builder::new()
            .name("nats-server".into())
            .spawn(move || keep(&executable, &path, &started, &stopped))
            .context("start a thread for the private nats-server")?;
        let mut server = Self {
            url: String::new(),
            monitoring_url: String::new(),
            stop: Some(stop),
            keeper: Some(keeper),
            _directory: directory,
        };
        let ports = start.recv().map_err(|_| anyhow!("the nats-server's thread ended early")).flatten()?;
        server.url = ports.nats.into_iter().next().context("nats-server listens on no port")?;
        server.monitoring_url = ports.monitoring.into_iter().next().context("nats-server has no monitoring port")?;
        Ok(server)
    }

    /// Where clients connect: `nats://127.0.0.1:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The monitoring endpoint (`/jsz`, `/healthz`, …): `http://127.0.0.1:PORT`.
    pub fn monitoring_url(&self) -> &str {
        &self.monitoring_url
    }
}

impl Drop for DevServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(keeper) = self.keeper.take() {
            // A keeper that panicked has dropped its end; nothing better can be done here.
            let _ = keeper.join();
        }
    }
}

/// What nats-server writes into `<name>_<pid>.ports` once it listens.
#[derive(Debug, Deserialize)]
struct Ports {
    nats: Vec<String>,
    #[serde(default)]
    monitoring: Vec<String>,
}

/// Starts the server, says how that went, and stops it when `stopped` hangs up.
fn keep(executable: &Path, directory: &Path, started: &Sender<Result<Ports>>, stopped: &Receiver<()>) {
    let mut child = match spawn(executable, directory) {
        Ok(child) => child,
        Err(err) => {
            let _ = started.send(Err(err));
            return;
        }
    };
    let ports = wait_for_ports(&mut child, directory);
    let listens = ports.is_ok();
    let _ = started.send(ports);
    if listens {
        // Nothing is ever sent; this returns when the sender is dropped.
        let _ = stopped.recv();
    }
    stop(&mut child);
}

fn spawn(executable: &Path, directory: &Path) -> Result<Child> {
    let log = File::create(directory.join("nats.log")).context("create the private nats-server's log")?;
    let mut command = Command::new(executable);
    command
        .args(["-c", "nats.conf"])
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("share the private nats-server's log")?)
        .stderr(log)
        // Its own group: Ctrl-C on the terminal is for the host, which still needs its server to finish.
        .process_group(0);
    #[cfg(target_os = "linux")]
    die_with_parent(&mut command);
    command.spawn().with_context(|| format!("start {}", executable.display()))
}

#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
    let parent = getpid();
    let in_child = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the call above, and then no signal comes.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::Error::from_raw_os_error(3)) }
    };
    // SAFETY: between fork and exec only two system calls are made; nothing allocates or takes a lock.
    unsafe { command.pre_exec(in_child) };
}

fn wait_for_ports(child: &mut Child, directory: &Path) -> Result<Ports> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if let Some(ports) = read_ports(directory) {
            return Ok(ports);
        }
        if let Some(status) = child.try_wait().context("wait for nats-server")? {
            bail!("nats-server ended with {status} instead of listening: {}", last_lines(directory));
        }
        ensure!(
            Instant::now() < deadline,
            "nats-server does not listen after {} s: {}",
            START_TIMEOUT.as_secs(),
            last_lines(directory)
        );
        thread::sleep(POLL);
    }
}

/// The ports, once the file is there and complete.
fn read_ports(directory: &Path) -> Option<Ports> {
    let file = fs::read_dir(directory)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "ports"))?;
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

fn last_lines(directory: &Path) -> String {
    let log = fs::read_to_string(directory.join("nats.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    if lines.is_empty() { "its log is empty".into() } else { lines[lines.len().saturating_sub(LOG_LINES)..].join("\n") }
}

fn stop(child: &mut Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // Only this thread reaps the child, so the number cannot belong to another process yet.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    while Instant::now() < deadline {
        if let Ok(Some(ExitStatus { .. })) = child.try_wait() {
            return;
        }
        thread::sleep(POLL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Looks for nats-server where a shell would, then where packages put it: Debian's is in /usr/sbin, which is not
/// on an ordinary user's PATH.
fn find() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"].map(PathBuf::from))
        .map(|directory| directory.join("nats-server"))
        .find(|candidate| is_executable(candidate))
        .context("no nats-server found; install it with `apt install nats-server`, or from https://nats.io/download")
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Something that is no nats-server says so, with what it printed.
    #[test]
    fn failed_start_carries_the_log() {
        let directory = tempfile::tempdir().expect("tempdir");
        let fake = directory.path().join("fake");
        fs::write(&fake, "#!/bin/sh\necho cannot do that >&2\nexit 3\n").expect("write");
        fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
        let err = format!("{:#}", DevServer::start(Some(&fake)).expect_err("must fail"));
        assert!(err.contains("cannot do that") && err.contains('3'), "{err}");

        let err =
            format!("{:#}", DevServer::start(Some(Path::new("/nonexistent/nats-server"))).expect_err("must fail"));
        assert!(err.contains("/nonexistent/nats-server"), "{err}");
    }

    #[test]
    fn half_written_ports_are_not_believed() {
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("nats-server_1.ports");
        assert!(read_ports(directory.path()).is_none());
        fs::write(&file, r#"{"nats":["nats://127.0"#).expect("write");
        assert!(read_ports(directory.path()).is_none());
        fs::write(&file, r#"{"nats":["nats://127.0.0.1:1"],"monitoring":["http://127.0.0.1:2"]}"#).expect("write");
        assert_eq!(read_ports(directory.path()).expect("ports").nats, ["nats://127.0.0.1:1"]);
    }
}
