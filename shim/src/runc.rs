//! The OCI runtime, runc or crun, for one container: it makes namespaces, cgroup and mounts, and drops privileges.

use crate::options::Options;
use crate::stdio::Ends;
use anyhow::{Context as _, Result, bail};
use rustix::process::Pid;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::process::Command;

/// Calls the runtime for one container. The caller holds a [`crate::reaper::Command`] meanwhile.
#[derive(Debug, Clone)]
pub struct Runc {
    binary: String,
    systemd_cgroup: bool,
    id: String,
    bundle: PathBuf,
}

/// A line of its log.
#[derive(Deserialize)]
struct Line {
    level: String,
    msg: String,
}

impl Runc {
    /// The runtime for container `id` in `bundle`, where it also keeps its own state, so that nothing of it outlives
    /// the bundle.
    pub fn new(options: &Options, id: &str, bundle: &Path, cgroups_path: &str) -> Self {
        Self {
            binary: options.binary_name.clone(),
            // Like `system.slice:runc:434234`; no path looks like that.
            systemd_cgroup: options.systemd_cgroup || cgroups_path.split(':').count() == 3,
            id: id.into(),
            bundle: bundle.into(),
        }
    }

    /// Makes the container and its first process, which waits for [`Runc::start`].
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn create(&self, ends: Ends, console: Option<&Path>) -> Result<Pid> {
        let pid_file = self.bundle.join("init.pid");
        let mut command = self.command();
        command.arg("create").arg("--bundle").arg(&self.bundle).arg("--pid-file").arg(&pid_file);
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        ends.give_to(&mut command);
        self.run(command.arg(&self.id)).await.context("create the container")?;
        read_pid(&pid_file)
    }

    /// Lets the first process begin.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn start(&self) -> Result<()> {
        self.run(self.command().args(["start", &self.id])).await.context("start the container")
    }

    /// Starts another process in the container, as the JSON text `process` describes it.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn exec(&self, exec_id: &str, process: &[u8], ends: Ends, console: Option<&Path>) -> Result<Pid> {
        let (file, pid_file) =
            (self.bundle.join(format!("{exec_id}.json")), self.bundle.join(format!("{exec_id}.pid")));
        fs::write(&file, process).with_context(|| format!("write {}", file.display()))?;
        let mut command = self.command();
        command.args(["exec", "--detach", "--process"]).arg(&file).arg("--pid-file").arg(&pid_file);
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        ends.give_to(&mut command);
        let ran = self.run(command.arg(&self.id)).await.context("execute in the container");
        let pid = ran.and_then(|()| read_pid(&pid_file));
        for file in [file, pid_file] {
            // It goes with the bundle at the latest.
            let _ = fs::remove_file(file);
        }
        pid
    }

    /// Stops all of the container's processes where they are.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn pause(&self) -> Result<()> {
        self.run(self.command().args(["pause", &self.id])).await.context("pause the container")
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn resume(&self) -> Result<()> {
        self.run(self.command().args(["resume", &self.id])).await.context("resume the container")
    }

    /// Sends a signal to the first process.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn kill(&self, signal: u32) -> Result<()> {
        self.run(self.command().args(["kill", &self.id, &signal.to_string()])).await.context("signal the container")
    }

    /// Sets the cgroup's limits, given as JSON (`linux.resources` of the specification).
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn update(&self, resources: &[u8]) -> Result<()> {
        let file = self.bundle.join("resources.json");
        fs::write(&file, resources).with_context(|| format!("write {}", file.display()))?;
        let mut command = self.command();
        command.args(["update", "--resources"]).arg(&file);
        self.run(command.arg(&self.id)).await.context("update the container")
    }

    /// Ends what is left of the container and removes it. One that is not there is no error.
    ///
    /// # Errors
    /// What the runtime says.
    pub async fn delete(&self) -> Result<()> {
        self.run(self.command().args(["delete", "--force", &self.id])).await.context("delete the container")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(self.bundle.join("runc"));
        command.args(["--log-format", "json", "--log"]).arg(self.log());
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn log(&self) -> PathBuf {
        self.bundle.join("runc.log")
    }

    /// Runs it to its end.
    ///
    /// Output cannot be awaited for what it says: a container inherits its pipes. It says it in its log.
    async fn run(&self, command: &mut Command) -> Result<()> {
        // What it said before is not what it says now.
        let _ = fs::remove_file(self.log());
        let binary = &self.binary;
        let status =
            command.status().await.with_context(|| format!("run {binary}, the OCI runtime of `BinaryName`"))?;
        if status.success() {
            return Ok(());
        }
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines = log.lines().rev().filter_map(|line| serde_json::from_str::<Line>(line).ok());
        match lines.into_iter().find(|line| line.level == "error") {
            Some(line) => bail!("{binary}: {}", line.msg.trim()),
            None => bail!("{binary} ended with {status} and said nothing"),
        }
    }
}

fn read_pid(file: &Path) -> Result<Pid> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    pid.with_context(|| format!("{}: no process id, but {text:?}", file.display()))
}
