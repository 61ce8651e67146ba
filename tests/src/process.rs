use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// A child process whose output is kept line by line, and which does not outlive this value.
///
/// When dropped it is killed (its own process only) and its last lines are printed, which the test runner shows for
/// a failed test.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: watch::Sender<Log>,
    readers: Vec<JoinHandle<()>>,
    quiet: bool,
}

/// Standard output and error as they came. Unbounded: a process of a test says little and lives for seconds.
#[derive(Debug, Default)]
struct Log {
    lines: Vec<String>,
    open_pipes: usize,
}

/// What is printed of a process's log when it is dropped.
const TAIL_LINES: usize = 100;

const POLL: Duration = Duration::from_millis(5);

impl Process {
    /// Starts `command` without standard input; `name` says in errors which process is meant.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(name: &str, mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {name}: {command:?}"))?;
        let log = watch::Sender::new(Log { lines: Vec::new(), open_pipes: 2 });
        let readers = vec![follow(child.stdout.take(), log.clone()), follow(child.stderr.take(), log.clone())];
        Ok(Self { name: name.to_owned(), child, log, readers, quiet: false })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has printed so far, line by line.
    pub fn lines(&self) -> Vec<String> {
        self.log.borrow().lines.clone()
    }

    /// What it printed last, for an error; all of it follows when it is dropped.
    fn last_line(&self) -> String {
        let log = self.log.borrow();
        match log.lines.iter().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => format!("its last line: {line}"),
            None => "it printed nothing".to_owned(),
        }
    }

    /// Keeps the log from being printed when this is dropped.
    pub fn quiet(&mut self) {
        self.quiet = true;
    }

    /// Waits for a line that `wanted` accepts, those already printed included, and returns it.
    ///
    /// # Errors
    /// When the deadline passes or the process closes its output first; the error quotes its last line.
    pub async fn wait_for_line(&self, deadline: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let mut log = self.log.subscribe();
        let mut looked_at = 0;
        let mut found = None;
        let seen = timeout(
            deadline,
            log.wait_for(|log| {
                found = log.lines[looked_at..].iter().find(|line| wanted(line)).cloned();
                looked_at = log.lines.len();
                found.is_some() || log.open_pipes == 0
            }),
        );
        let in_time = seen.await.is_ok();
        match found {
            Some(line) => Ok(line),
            None if in_time => bail!("{} ended without printing the awaited line; {}", self.name, self.last_line()),
            None => bail!("{} did not print the awaited line within {deadline:?}; {}", self.name, self.last_line()),
        }
    }

    /// Sends a signal to the process itself.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if !self.is_running()? {
            bail!("{} has ended, so it cannot be sent {signal:?}; {}", self.name, self.last_line());
        }
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("send {signal:?} to {} (pid {})", self.name, self.id()))
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the system cannot say.
    pub fn is_running(&mut self) -> Result<bool> {
        let status = self.child.try_wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(status.is_none())
    }

    /// Waits, without a deadline, until it has closed its output, and returns its last line: for a `select!` beside
    /// what should happen first.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn wait_for_end(&self) -> String {
        // Fails only without a sender, and this value holds one.
        _ = self.log.subscribe().wait_for(|log| log.open_pipes == 0).await;
        self.last_line()
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it still runs at the deadline; the error quotes its last line.
    pub async fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.child.try_wait().with_context(|| format!("wait for {}", self.name))? {
                self.join_readers();
                return Ok(status);
            }
            if Instant::now() >= end {
                bail!("{} still runs after {deadline:?}; {}", self.name, self.last_line());
            }
            sleep(POLL).await;
        }
    }

    /// Ends it at once (SIGKILL), if it still runs.
    pub fn kill(&mut self) {
        // Both fail only for a process that is gone already.
        _ = self.child.kill();
        _ = self.child.wait();
        self.join_readers();
    }

    fn join_readers(&mut self) {
        for reader in self.readers.drain(..) {
            _ = reader.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if !self.quiet {
            let log = self.log.borrow();
            let lines = &log.lines[log.lines.len().saturating_sub(TAIL_LINES)..];
            // `eprintln!`, unlike a write to the handle, is captured by the test runner.
            let (name, id, shown, all) = (&self.name, self.id(), lines.len(), log.lines.len());
            eprintln!("--- {name} (pid {id}), last {shown} of {all} lines ---\n{}", lines.join("\n"));
        }
    }
}

/// Moves lines from a pipe to the log until the process closes it.
fn follow(pipe: Option<impl Read + Send + 'static>, log: watch::Sender<Log>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in pipe.into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n')) {
            let Ok(line) = line else { break };
            log.send_modify(|log| log.lines.push(String::from_utf8_lossy(&line).into_owned()));
        }
        log.send_modify(|log| log.open_pipes -= 1);
    })
}
