//! Commands that run once and end, bounded in time.

use crate::tools;
use anyhow::{Context as _, Result, bail, ensure};
use std::env;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

/// What a command left: its exit status and what it printed.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
    command: String,
}

impl Output {
    /// The exit code; `None` when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Takes only success.
    ///
    /// # Errors
    /// When the command failed; the error quotes what it printed.
    pub fn success(self) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        bail!("{} failed ({})\n{}{}", self.command, self.status, self.stdout, self.stderr)
    }
}

/// Runs `program` to its end with `input` as its standard input.
///
/// # Errors
/// When it cannot be started, or has not ended at the deadline (it is killed then). A failing exit code is no error:
/// see [`Output::success`].
///
/// # Cancel safety
/// Dropping the future kills the process.
pub async fn run<A: AsRef<OsStr>>(
    program: impl AsRef<Path>,
    args: impl IntoIterator<Item = A>,
    input: &[u8],
    deadline: Duration,
) -> Result<Output> {
    let program = program.as_ref();
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    for variable in settings_of_ours() {
        command.env_remove(variable);
    }
    command.envs(tools::cache());
    let shown = format!("{:?}", command.as_std());
    let mut child = command.spawn().with_context(|| format!("start {shown}"))?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A command that does not read its input closes the pipe; that is its right.
            _ = stdin.write_all(input).await;
        }
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let Ok(output) = timeout(deadline, both).await else { bail!("{shown}: not finished within {deadline:?}") };
    let output = output.with_context(|| format!("wait for {shown}"))?;
    Ok(Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command: shown,
    })
}

/// Runs `host` with `args` to its end, within 60 s.
///
/// # Errors
/// As [`run`], and when the executable has not been built.
pub async fn host<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<Output> {
    run(tools::host()?, args, b"", Duration::from_secs(60)).await
}

/// Checks what `executable` says of itself as `name`: this source tree's version to `-V`, and to `--version` the commit
/// that it was built from and wasmtime's version too. Returns the latter.
///
/// # Errors
/// When it says anything else. Where git knows no commit, any is right.
pub async fn version(executable: &Path, name: &str) -> Result<String> {
    let short = run(executable, ["-V"], b"", Duration::from_secs(10)).await?.success()?.stdout;
    let expected = concat!(env!("CARGO_PKG_VERSION"), "\n");
    ensure!(short == format!("{name} {expected}"), "{} -V: {short}", executable.display());
    let long = run(executable, ["--version"], b"", Duration::from_secs(10)).await?.success()?.stdout;
    let lock = include_str!("../../Cargo.lock");
    let wasmtime = lock.split("name = \"wasmtime\"\nversion = \"").nth(1).and_then(|rest| rest.split('"').next());
    let end = format!(", wasmtime {})\n", wasmtime.context("wasmtime in Cargo.lock")?);
    let commit = long.strip_prefix(&format!("{} (commit ", short.trim_end())).and_then(|rest| rest.strip_suffix(&end));
    let commit = commit.with_context(|| format!("{} --version: {long}", executable.display()))?;
    let workspace = tools::workspace();
    let git = async |revision: &str| {
        let args = ["rev-parse", "--verify", "--quiet", &format!("{revision}^{{commit}}")];
        let args = ["-C".as_ref(), workspace.as_os_str()].into_iter().chain(args.iter().map(AsRef::as_ref));
        run("git", args, b"", Duration::from_secs(10)).await.is_ok_and(|output| output.status.success())
    };
    if git("HEAD").await {
        let hash = commit.strip_suffix("-dirty").unwrap_or(commit);
        ensure!(git(hash).await, "{}: git knows no commit {hash}: {long}", executable.display());
    }
    Ok(long)
}

/// The variables of the caller's environment that would change what the host does.
pub(crate) fn settings_of_ours() -> impl Iterator<Item = std::ffi::OsString> {
    env::vars_os().map(|(name, _)| name).filter(|name| {
        let name = name.to_string_lossy();
        name.starts_with("MAILROOM_") || name == "RUST_LOG"
    })
}
