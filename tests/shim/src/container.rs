use crate::pod::{Pod, namespaces, pid_in};
use anyhow::{Context as _, Result, bail};
use k8s_cri::v1::{
    Capability, ContainerConfig, ContainerMetadata, ContainerState, ContainerStats, ContainerStatsRequest,
    ContainerStatus, ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, ImageSpec,
    Int64Value, KeyValue, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, Mount,
    RemoveContainerRequest, SecurityProfile, StartContainerRequest, StopContainerRequest,
    UpdateContainerResourcesRequest, security_profile::ProfileType,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tests::eventually;
use tonic::Status;

/// The user of containers that run as nobody in particular.
pub const NONROOT: i64 = 65532;

/// What Kubernetes hides of the kernel.
pub const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// What it lets be read only.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A container, created or further.
#[derive(Debug)]
pub struct Container<'a> {
    pod: &'a Pod<'a>,
    id: String,
    log: PathBuf,
    termination: PathBuf,
}

/// What a container is made with.
///
/// By default it is one that a careful user writes, and that the strictest of Kubernetes' security standards takes:
/// user 65532, no capabilities, no new privileges, the default seccomp filter, nothing of its image to be written.
#[derive(Clone, Debug)]
pub struct ContainerBuilder<'a> {
    pod: &'a Pod<'a>,
    config: ContainerConfig,
    security: LinuxContainerSecurityContext,
    resources: LinuxContainerResources,
}

/// A line of a container's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// What was printed, without the line's end.
    pub text: String,
}

/// Makes containers' names.
static COUNT: AtomicU64 = AtomicU64::new(0);

impl<'a> ContainerBuilder<'a> {
    pub(crate) fn new(pod: &'a Pod<'a>, image: &str) -> Self {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let security = LinuxContainerSecurityContext {
            capabilities: Some(Capability { drop_capabilities: vec!["ALL".to_owned()], ..Default::default() }),
            namespace_options: Some(namespaces(pod.network())),
            run_as_user: Some(Int64Value { value: NONROOT }),
            run_as_group: Some(Int64Value { value: NONROOT }),
            readonly_rootfs: true,
            no_new_privs: true,
            masked_paths: words(&MASKED),
            readonly_paths: words(&READ_ONLY),
            seccomp: Some(SecurityProfile {
                profile_type: ProfileType::RuntimeDefault.into(),
                localhost_ref: String::new(),
            }),
            ..Default::default()
        };
        let name = format!("container-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let config = ContainerConfig {
            image: Some(ImageSpec { image: format!("mailroom.local/{image}:1"), ..Default::default() }),
            log_path: format!("{name}/0.log"),
            metadata: Some(ContainerMetadata { name, attempt: 0 }),
            ..Default::default()
        };
        Self { pod, config, security, resources: LinuxContainerResources::default() }
    }

    /// Adds arguments, those of the pod's spec, which follow the image's entrypoint.
    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.config.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Replaces the image's entrypoint, as the command of the pod's spec does.
    #[must_use]
    pub fn command(mut self, command: &[&str]) -> Self {
        self.config.command = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.config.envs.push(KeyValue { key: name.to_owned(), value: value.to_owned() });
        self
    }

    /// Mounts a file or folder of the node to be read, as a volume is.
    #[must_use]
    pub fn volume(mut self, node: &Path, container: &str) -> Self {
        self.config.mounts.push(Mount {
            container_path: container.to_owned(),
            host_path: node.to_string_lossy().into_owned(),
            readonly: true,
            ..Default::default()
        });
        self
    }

    /// Changes the security context.
    #[must_use]
    pub fn security(mut self, change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> Self {
        change(&mut self.security);
        self
    }

    /// Changes what the container may use.
    #[must_use]
    pub fn resources(mut self, change: impl FnOnce(&mut LinuxContainerResources)) -> Self {
        change(&mut self.resources);
        self
    }

    /// Creates the container.
    ///
    /// # Errors
    /// When containerd refuses, for an image that there is not for instance.
    pub async fn create(mut self) -> Result<Container<'a>> {
        let log = self.pod.logs().join(&self.config.log_path);
        let folder = log.parent().context("a log has a folder")?.to_owned();
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        // Every container has such a file; what it writes there is shown as the reason of its end.
        let termination = folder.join("termination-log");
        fs::write(&termination, "").with_context(|| format!("write {}", termination.display()))?;
        let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        fs::set_permissions(&termination, everyone).with_context(|| format!("open {}", termination.display()))?;
        self.config.mounts.push(Mount {
            container_path: "/dev/termination-log".to_owned(),
            host_path: termination.to_string_lossy().into_owned(),
            ..Default::default()
        });
        self.config.linux =
            Some(LinuxContainerConfig { resources: Some(self.resources), security_context: Some(self.security) });
        let request = CreateContainerRequest {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config),
            sandbox_config: Some(self.pod.config.clone()),
        };
        let created = self.pod.node.runtime().create_container(request).await.context("create the container")?;
        Ok(Container { pod: self.pod, id: created.into_inner().container_id, log, termination })
    }

    /// Creates the container and starts it.
    ///
    /// # Errors
    /// When containerd or the shim refuses either.
    pub async fn start(self) -> Result<Container<'a>> {
        let container = self.create().await?;
        container.start().await?;
        Ok(container)
    }
}

impl Container<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Starts it.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn start(&self) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: self.id.clone() };
        self.pod.node.runtime().start_container(request).await.map(drop)
    }

    /// What containerd says of it.
    ///
    /// # Errors
    /// When it has been removed.
    pub async fn status(&self) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let response = self.pod.node.runtime().container_status(request).await?.into_inner();
        response.status.context("a container has a status")
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When it runs still at the deadline.
    pub async fn ended(&self, deadline: Duration) -> Result<ContainerStatus> {
        let ended = |status: &ContainerStatus| status.state() == ContainerState::ContainerExited;
        eventually(deadline, "the container has ended", async || self.status().await, ended).await
    }

    /// The process id of its first process.
    ///
    /// # Errors
    /// When it has none.
    pub async fn pid(&self) -> Result<u32> {
        let request = ContainerStatusRequest { container_id: self.id.clone(), verbose: true };
        pid_in(&self.pod.node.runtime().container_status(request).await?.into_inner().info).context("of the container")
    }

    /// A file of the kernel about its first process, `/proc/PID/FILE`.
    ///
    /// # Errors
    /// When there is no such process or file.
    pub async fn proc(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.pid().await?);
        let content = fs::read(&path).with_context(|| format!("read {path}"))?;
        Ok(String::from_utf8_lossy(&content).into_owned())
    }

    /// A field of the kernel's status of its first process, such as `CapEff`.
    ///
    /// # Errors
    /// When there is none.
    pub async fn proc_status(&self, field: &str) -> Result<String> {
        let status = self.proc("status").await?;
        let fields = status.lines().filter_map(|line| line.split_once(':'));
        let value = fields.into_iter().find(|(key, _)| *key == field).map(|(_, value)| value.trim().to_owned());
        value.with_context(|| format!("no {field} in the status"))
    }

    /// What its cgroup has in a file; see [`crate::cgroup::Cgroups::of_process`].
    ///
    /// # Errors
    /// When it has ended, or the file is not there.
    pub async fn cgroup(&self, controller: &str, version_1: &str, version_2: &str) -> Result<String> {
        self.pod.node.cgroups.of_process(self.pid().await?, controller, version_1, version_2)
    }

    /// Everything that it has printed and containerd has written down.
    ///
    /// # Errors
    /// When something of it is not in CRI's format.
    pub fn log(&self) -> Result<Vec<Line>> {
        let text = fs::read(&self.log).with_context(|| format!("read {}", self.log.display()))?;
        let mut lines: Vec<Line> = Vec::new();
        // Pieces of a line that is longer than containerd takes at once, by stream.
        let mut pieces: Vec<Line> = Vec::new();
        let mut text = text.split(|&byte| byte == b'\n').collect::<Vec<_>>();
        // What follows the last line's end is nothing, or a line that is being written.
        text.pop();
        for line in text {
            let line = String::from_utf8_lossy(line);
            let [_time, stream, tag, text] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else {
                bail!("{line:?} is no line of CRI's log format");
            };
            let at = pieces.iter().position(|piece| piece.stream == stream);
            let mut whole = match at {
                Some(at) => pieces.remove(at),
                None => Line { stream: stream.to_owned(), text: String::new() },
            };
            whole.text += text;
            match tag {
                "P" => pieces.push(whole),
                "F" => lines.push(whole),
                _ => bail!("{line:?} is neither whole nor a part"),
            }
        }
        Ok(lines)
    }

    /// Waits for a line of the log that `wanted` accepts, those already there included.
    ///
    /// # Errors
    /// When there is none at the deadline; the error quotes the log.
    pub async fn wait_for_line(&self, deadline: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let found = |lines: &Vec<Line>| lines.iter().any(|line| wanted(&line.text));
        let lines = eventually(deadline, "the awaited line of the log", async || self.log(), found).await?;
        let line = lines.into_iter().find(|line| wanted(&line.text));
        Ok(line.context("the line that was just found")?.text)
    }

    /// What it left as the reason of its end.
    ///
    /// # Errors
    /// When the file is gone.
    pub fn termination_message(&self) -> Result<String> {
        fs::read_to_string(&self.termination).with_context(|| format!("read {}", self.termination.display()))
    }

    /// Stops it as a kubelet does: SIGTERM, and SIGKILL when the grace period of whole seconds is over.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn stop(&self, grace: Duration) -> Result<ContainerStatus> {
        let timeout = grace.as_secs().try_into()?;
        let request = StopContainerRequest { container_id: self.id.clone(), timeout };
        self.pod.node.runtime().stop_container(request).await.context("stop the container")?;
        self.status().await
    }

    /// Runs a command in it and waits for the command's end.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn exec(&self, command: &[&str]) -> Result<ExecSyncResponse, Status> {
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        let request = ExecSyncRequest { container_id: self.id.clone(), cmd, timeout: 30 };
        self.pod.node.runtime().exec_sync(request).await.map(tonic::Response::into_inner)
    }

    /// What it uses.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn stats(&self) -> Result<ContainerStats> {
        let request = ContainerStatsRequest { container_id: self.id.clone() };
        let response = self.pod.node.runtime().container_stats(request).await?.into_inner();
        response.stats.context("a container has stats")
    }

    /// Changes what it may use while it runs.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn update(&self, resources: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            ..Default::default()
        };
        self.pod.node.runtime().update_container_resources(request).await.context("update the container")?;
        Ok(())
    }

    /// Removes it, killing it if it runs.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn remove(self) -> Result<()> {
        let request = RemoveContainerRequest { container_id: self.id };
        self.pod.node.runtime().remove_container(request).await.context("remove the container")?;
        Ok(())
    }
}
