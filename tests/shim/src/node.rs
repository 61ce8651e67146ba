use crate::cgroup::{Cgroups, Driver, Limits};
use crate::image::{Image, archive};
use crate::leftovers;
use crate::network::Bridge;
use crate::pod::PodBuilder;
use anyhow::{Context as _, Result, ensure};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ImageSpec, ImageStatusRequest, ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest,
    VersionRequest,
};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, getuid, kill_process};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tests::{NatsServer, Process, Settings, command, eventually, tools};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// The runtime handler that the tests are about.
pub const MAILROOM: &str = "mailroom";

/// containerd's own, for comparison.
pub const RUNC: &str = "runc";

/// The same with crun.
pub const CRUN: &str = "crun";

/// The runtime handler with our shim and crun.
pub const MAILROOM_CRUN: &str = "mailroom-crun";

/// The handlers with our shim: the name, what the shim's options have beside the cache, what the table of containerd's
/// configuration has beside the options.
const HANDLERS: [(&str, &str, &str); 5] = [
    (MAILROOM, "", ""),
    ("mailroom-systemd", "SystemdCgroup = true\n", ""),
    (MAILROOM_CRUN, "BinaryName = \"crun\"\n", ""),
    ("mailroom-compiled", "AllowCompiled = true\n", ""),
    ("mailroom-limits", "", "base_runtime_spec = \"limits.json\"\n"),
];

/// Runs containerd as an init does for services: restarts it for whoever asks. The first argument is a FIFO, the others
/// are the command.
const SUPERVISOR: &str = "while :; do \"$@\" & read -r _ < \"$0\"; kill $!; wait $!; done";

/// A containerd is there in a third of a second; a machine that compiles beside it is slow.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// One call of a kubelet; it waits for at most two minutes itself.
const CALL_DEADLINE: Duration = Duration::from_secs(120);

/// Shims end by themselves when their pod is gone.
pub(crate) const GONE_DEADLINE: Duration = Duration::from_secs(20);

/// A node: a containerd of its own with configuration, images, network and cgroups, and the part of a kubelet.
///
/// Everything is in a folder of its own but the cgroups, the bridge and the shims' sockets, which the kernel, `ip` and
/// containerd want elsewhere. When it is dropped all of it goes, in whatever state it is; [`Node::finish`] shows that
/// nothing was left to be removed.
#[derive(Debug)]
pub struct Node {
    folder: TempDir,
    containerd: Mutex<Option<Process>>,
    channel: Channel,
    pub(crate) cgroups: Cgroups,
    bridge: Bridge,
    sockets: Mutex<BTreeSet<PathBuf>>,
    /// A mount that this machine has and the node has not.
    hidden: Option<&'static Path>,
    shim: Shim,
}

/// Whether a node has our shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shim {
    /// containerd knows it.
    Placed,
    /// Nothing of it is there. There is a folder for it, [`Node::bin`], and [`Node::restart`] restarts containerd.
    Absent,
}

impl Node {
    /// Starts a node with the images `pause` and `sidecar`.
    ///
    /// # Errors
    /// When this is not root, or something is not installed or not built; the error names the command that does it.
    pub async fn start() -> Result<Self> {
        Self::start_with(Driver::Cgroupfs, None).await
    }

    /// As [`Node::start`], but systemd makes the cgroups.
    ///
    /// # Errors
    /// As [`Node::start`], and when systemd is not this machine's init.
    pub async fn start_with_systemd() -> Result<Self> {
        Self::start_with(Driver::Systemd, None).await
    }

    /// As [`Node::start`], but where both versions of cgroups are mounted the node sees the older alone: crun refuses
    /// to work beside a newer one that has controllers.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_for_crun() -> Result<Self> {
        let beside = Path::new("/sys/fs/cgroup/unified");
        Self::start_with(Driver::Cgroupfs, beside.exists().then_some(beside)).await
    }

    /// As [`Node::start`], but for a real kubelet, which makes the cgroups.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub(crate) async fn start_for_kubelet(shim: Shim) -> Result<Self> {
        let node = Self::start_as(Driver::Kubelet, None, shim).await?;
        node.cgroups.make_first()?;
        Ok(node)
    }

    async fn start_with(driver: Driver, hidden: Option<&'static Path>) -> Result<Self> {
        Self::start_as(driver, hidden, Shim::Placed).await
    }

    async fn start_as(driver: Driver, hidden: Option<&'static Path>, shim: Shim) -> Result<Self> {
        ensure!(getuid().is_root(), "only root may start containers; run the tests of the shim as root");
        tools::installed("runc", "runc")?;
        tools::installed("crun", "crun")?;
        let folder = tempfile::Builder::new().prefix("mailroom-node-").tempdir().context("make a temporary folder")?;
        let socket = folder.path().join("containerd.sock");
        // Nothing is connected before the first call, and what is broken is connected anew.
        let endpoint = Endpoint::from_static("http://containerd").timeout(CALL_DEADLINE);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        }));
        let name = folder.path().file_name().context("the temporary folder has no name")?.to_string_lossy();
        let cgroups = Cgroups::new(&name, driver)?;
        let bridge = Bridge::new()?;
        let sockets = Mutex::default();
        let node = Self { containerd: Mutex::new(None), channel, cgroups, bridge, sockets, hidden, shim, folder };
        node.configure().await?;
        node.start_containerd().await?;
        let sidecar = fs::read(tools::sidecar()?).context("read the sidecar")?;
        let image = |name, entrypoint| Image::scratch(name, entrypoint).file("/sidecar", sidecar.clone());
        let images = [image("pause", &["/sidecar", "wait"]), image("sidecar", &["/sidecar"])];
        node.import(&images).await?;
        Ok(node)
    }

    /// What belongs to the node alone.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where our shim keeps compiled components.
    pub fn cache(&self) -> PathBuf {
        self.folder().join("compiled")
    }

    /// A folder on containerd's path where there is no shim yet.
    pub fn bin(&self) -> PathBuf {
        self.folder().join("bin")
    }

    /// A program that restarts containerd where there is no shim yet.
    pub fn restart(&self) -> PathBuf {
        self.folder().join("restart-containerd")
    }

    /// containerd's configuration.
    pub fn configuration(&self) -> PathBuf {
        self.folder().join("config.toml")
    }

    /// The options of our shim for the handler [`MAILROOM`].
    pub fn options(&self) -> PathBuf {
        self.folder().join(format!("{MAILROOM}.toml"))
    }

    /// The address of this machine that every pod reaches, with its own network or not.
    pub fn address(&self) -> Ipv4Addr {
        self.bridge.address()
    }

    /// A nats-server that every pod reaches.
    ///
    /// # Errors
    /// As [`NatsServer::start_with`].
    pub async fn nats(&self, settings: Settings) -> Result<NatsServer> {
        NatsServer::start_with(Settings { address: self.address(), ..settings }).await
    }

    /// Prepares a pod for the handler [`MAILROOM`].
    pub fn pod(&self) -> PodBuilder<'_> {
        PodBuilder::new(self, MAILROOM)
    }

    /// Prepares a pod for any handler.
    pub fn pod_of(&self, handler: &str) -> PodBuilder<'_> {
        PodBuilder::new(self, handler)
    }

    /// Gives the node more images.
    ///
    /// # Errors
    /// When containerd refuses one.
    pub async fn import(&self, images: &[Image]) -> Result<()> {
        let file = tempfile::NamedTempFile::new_in(self.folder()).context("make a file for images")?;
        fs::write(file.path(), archive(images)?).context("write images")?;
        self.import_archive(file.path()).await?;
        for image in images {
            self.until_image(image.name()).await?;
        }
        Ok(())
    }

    /// Gives the node the images of an OCI layout in a tar.
    ///
    /// # Errors
    /// When containerd refuses them.
    pub async fn import_archive(&self, file: &Path) -> Result<()> {
        self.ctr(&["image", "import", &file.to_string_lossy()]).await?.success()?;
        Ok(())
    }

    /// Waits until CRI, which learns of new images by events, knows one.
    ///
    /// # Errors
    /// When it does not within 20 s.
    pub async fn until_image(&self, name: &str) -> Result<()> {
        let what = format!("the image {name} is known");
        let look = async || {
            let image = Some(ImageSpec { image: name.to_owned(), ..Default::default() });
            let request = ImageStatusRequest { image, verbose: false };
            Ok(ImageServiceClient::new(self.channel.clone()).image_status(request).await?.into_inner().image.is_some())
        };
        eventually(GONE_DEADLINE, &what, look, |known| *known).await.map(drop)
    }

    /// Runs `ctr` in the namespace of Kubernetes.
    ///
    /// # Errors
    /// As [`command::run`].
    pub async fn ctr(&self, args: &[&str]) -> Result<command::Output> {
        let ctr = self.ctr_words(args)?;
        command::run(&ctr[0], &ctr[1..], b"", CALL_DEADLINE).await
    }

    /// Runs a container by hand, without a pod: `ctr run` with our shim and `args` after the options that every such
    /// run needs, with `input` as its standard input.
    ///
    /// # Errors
    /// As [`command::run`].
    pub async fn run_by_hand(&self, args: &[&str], input: &[u8]) -> Result<command::Output> {
        let ctr = self.by_hand_words(args)?;
        command::run(&ctr[0], &ctr[1..], input, CALL_DEADLINE).await
    }

    /// The same at a terminal, whose output is all that there is.
    ///
    /// # Errors
    /// As [`command::run`].
    pub async fn run_at_terminal(&self, args: &[&str], input: &[u8]) -> Result<command::Output> {
        let args = [&["--tty"], args].concat();
        let script = ["--quiet", "--return", "--command", &self.by_hand_words(&args)?.join(" "), "/dev/null"];
        command::run(tools::installed("script", "bsdutils")?, script, input, CALL_DEADLINE).await
    }

    /// A command of `ctr`, in the namespace of Kubernetes.
    fn ctr_words(&self, args: &[&str]) -> Result<Vec<String>> {
        let (ctr, socket) = (tools::installed("ctr", "containerd")?, self.socket());
        let fixed = [&*ctr.to_string_lossy(), "--address", &*socket.to_string_lossy(), "--namespace", "k8s.io"];
        Ok(fixed.iter().chain(args).map(|&word| word.to_owned()).collect())
    }

    fn by_hand_words(&self, args: &[&str]) -> Result<Vec<String>> {
        let options = self.folder().join(format!("{MAILROOM}.toml"));
        let cgroup = format!("{}by-hand/container", self.cgroup());
        let fixed = ["run", "--rm", "--net-host", "--runtime", "io.containerd.mailroom.v1", "--cgroup", &cgroup];
        let options = ["--runtime-config-path", &options.to_string_lossy()];
        self.ctr_words(&[&fixed[..], &options, args].concat())
    }

    /// Ends containerd at once, as a crash would; its pods go on.
    pub fn kill_containerd(&self) {
        // It has the pipes of whoever supervises it, and they are read until their end.
        if self.shim == Shim::Absent {
            for process in self.processes().iter().filter(|process| self.is_containerd(process)) {
                kill(process.pid);
            }
        }
        *self.containerd() = None;
    }

    fn is_containerd(&self, process: &leftovers::Found) -> bool {
        process.command.contains(&format!("containerd --config {}", self.configuration().display()))
    }

    /// Starts containerd, for the first time or again, and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn start_containerd(&self) -> Result<()> {
        self.kill_containerd();
        let containerd = tools::installed("containerd", "containerd")?;
        let mut command = match self.hidden {
            None if self.shim == Shim::Absent => {
                let mut command = Command::new("sh");
                command.args(["-c", SUPERVISOR]).arg(self.requests()).arg(containerd);
                command
            }
            None => Command::new(containerd),
            Some(hidden) => {
                let mut command = Command::new(tools::installed("unshare", "util-linux")?);
                command.args(["--mount", "--propagation", "private", "sh", "-c", "umount \"$0\" && exec \"$@\""]);
                command.arg(hidden).arg(containerd);
                command
            }
        };
        command.arg("--config").arg(self.configuration());
        // The shim is found on containerd's path.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let shim = if self.shim == Shim::Placed { tools::shim()? } else { self.bin() };
        let path = [shim].into_iter().chain(std::env::split_paths(&path)).chain(["/usr/sbin".into()]);
        command.env("PATH", std::env::join_paths(path)?).env("CONTAINERD_SECRET", "for no pod to see");
        *self.containerd() = Some(Process::spawn("containerd", command)?);
        let answers = async || {
            ensure!(
                self.containerd().as_mut().is_some_and(|process| process.is_running().unwrap_or(false)),
                "it ended"
            );
            Ok(self.runtime().version(VersionRequest::default()).await?)
        };
        eventually(START_DEADLINE, "containerd answers", answers, |_| true).await.map(drop)
    }

    /// The processes that belong to the node, those of containerd, of the shims and of the pods.
    pub fn processes(&self) -> Vec<leftovers::Found> {
        leftovers::processes(self.folder(), &self.cgroup())
    }

    /// The path of a process's memory cgroup.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cgroup_of(&self, pid: u32) -> Result<String> {
        self.cgroups.path_of_process(pid, "memory")
    }

    /// The shims that run, by the ids of their processes.
    pub fn shims(&self) -> Vec<u32> {
        let socket = self.socket();
        let processes = self.processes().into_iter();
        let is_shim =
            |command: &str| command.contains("containerd-shim-") && command.contains(&*socket.to_string_lossy());
        processes.filter(|process| is_shim(&process.command)).map(|process| process.pid).collect()
    }

    /// Removes the pods that are left, as a kubelet does when they are deleted, and shows that nothing remains of any
    /// pod: no process, no mount, no cgroup, no socket, no bundle, no port of the bridge.
    ///
    /// # Errors
    /// When something remains; the error names it.
    pub async fn finish(self) -> Result<()> {
        let pods = self.runtime().list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
        for pod in pods {
            let pod_sandbox_id = pod.id;
            self.runtime().stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }).await?;
            self.runtime().remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }).await?;
        }
        self.nothing_left().await?;
        if let Some(containerd) = self.containerd().as_mut() {
            containerd.quiet();
        }
        Ok(())
    }

    /// Shows that nothing remains of the pods there were; none may be left.
    ///
    /// # Errors
    /// When something remains after 20 s; the error names it.
    pub async fn nothing_left(&self) -> Result<()> {
        let look = async || Ok(self.left());
        eventually(GONE_DEADLINE, "nothing is left of any pod", look, Vec::is_empty).await.map(drop)
    }

    /// What there is now of pods, in words.
    pub fn left(&self) -> Vec<String> {
        self.left_beside(&[])
    }

    /// The same, without the processes `others`, which are not of pods.
    pub(crate) fn left_beside(&self, others: &[u32]) -> Vec<String> {
        let own = self.containerd().as_ref().map(Process::id);
        let mut left = Vec::new();
        let is_own = |process: &leftovers::Found| {
            Some(process.pid) == own || others.contains(&process.pid) || self.is_containerd(process)
        };
        let processes = self.processes().into_iter().filter(|process| !is_own(process));
        left.extend(processes.map(|process| format!("process {}: {}", process.pid, process.command)));
        left.extend(self.mounts().iter().map(|mount| format!("mount {}", mount.display())));
        let cgroups = self.cgroups.of_containers();
        left.extend(cgroups.iter().map(|cgroup| format!("cgroup {}", cgroup.display())));
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner).clone();
        left.extend(sockets.iter().filter(|socket| socket.exists()).map(|s| format!("socket {}", s.display())));
        left.extend(self.bundles().iter().map(|bundle| format!("bundle {}", bundle.display())));
        match self.bridge.ports() {
            0 => {}
            ports => left.push(format!("{ports} ports of the bridge")),
        }
        left
    }

    pub(crate) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    pub(crate) fn make_cgroup(&self, uid: &str, limits: Limits) -> Result<String> {
        self.cgroups.make_pod(uid, limits)
    }

    /// Notes where the shims of all containers are called, so that their sockets can be looked for when they are gone.
    pub(crate) fn note_sockets(&self) {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        for bundle in self.bundles() {
            // A bundle that is being made or removed has none.
            let address = fs::read_to_string(bundle.join("address")).unwrap_or_default();
            if let Some(socket) = address.trim().strip_prefix("unix://") {
                sockets.insert(socket.into());
            }
        }
    }

    fn containerd(&self) -> MutexGuard<'_, Option<Process>> {
        self.containerd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A FIFO: who opens it to write has containerd restarted.
    fn requests(&self) -> PathBuf {
        self.folder().join("requests")
    }

    /// Where containerd listens.
    pub fn socket(&self) -> PathBuf {
        self.folder().join("containerd.sock")
    }

    /// What containerd keeps of every container, a folder each.
    fn bundles(&self) -> Vec<PathBuf> {
        let entries = |folder: PathBuf| folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
        entries(self.folder().join("state/io.containerd.runtime.v2.task")).flat_map(entries).collect()
    }

    /// The first part of the names of all cgroups of this node's pods.
    fn cgroup(&self) -> String {
        format!("/{}/", self.cgroups.first())
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let process = self.containerd().as_ref().map_or("self".to_owned(), |process| process.id().to_string());
        leftovers::mounts(&process, self.folder())
    }

    async fn configure(&self) -> Result<()> {
        let folder = self.folder();
        let plugins = tools::installed_in("/usr/lib/cni", "bridge", "containernetworking-plugins")?;
        let write = |name: &str, text: &str| {
            let file = folder.join(name);
            fs::write(&file, text).with_context(|| format!("write {}", file.display()))
        };
        fs::create_dir(folder.join("cni")).context("make a folder for CNI")?;
        write("cni/10-pods.conflist", &self.bridge.cni(&folder.join("addresses")))?;
        let spec = self.ctr(&["oci", "spec"]).await?.success()?.stdout;
        let mut spec: Value = serde_json::from_str(&spec).context("read containerd's default specification")?;
        spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 1234, "hard": 2345 }]);
        write("limits.json", &spec.to_string())?;
        if self.shim == Shim::Absent {
            fs::create_dir(self.bin()).context("make a folder for the shim")?;
            rustix::fs::mkfifoat(rustix::fs::CWD, self.requests(), 0o600.into()).context("make a FIFO")?;
            write("restart-containerd", &format!("#!/bin/sh\necho restart > {}\n", self.requests().display()))?;
            let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(self.restart(), everyone).context("make it executable")?;
        }
        let mut runtimes = String::new();
        for (handler, options, table) in HANDLERS {
            let file = format!("{handler}.toml");
            write(&file, &format!("Cache = {:?}\n{options}", self.cache()))?;
            if self.shim == Shim::Absent {
                continue;
            }
            let file = folder.join(file);
            let table = table.replace("limits.json", &folder.join("limits.json").to_string_lossy());
            runtimes += &format!(
                r#"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}]
    runtime_type = "io.containerd.mailroom.v1"
    {table}
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}.options]
      ConfigPath = {file:?}
"#
            );
        }
        // A process may not give itself a lower OOM score than its parent's without CAP_SYS_RESOURCE, which many
        // containers that tests run in do not have.
        write(
            "config.toml",
            &format!(
                r#"version = 2
root = {:?}
state = {:?}
[grpc]
  address = {:?}
[plugins."io.containerd.internal.v1.opt"]
  path = {:?}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "mailroom.local/pause:1"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = {plugins:?}
    conf_dir = {:?}
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
      BinaryName = "crun"
{runtimes}"#,
                folder.join("root"),
                folder.join("state"),
                self.socket(),
                folder.join("opt"),
                folder.join("cni"),
            ),
        )
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.note_sockets();
        self.kill_containerd();
        // A shim that dies may just be starting something.
        let end = Instant::now() + GONE_DEADLINE;
        while Instant::now() < end {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            left.iter().for_each(|process| kill(process.pid));
            std::thread::sleep(Duration::from_millis(20));
        }
        for mount in self.mounts() {
            _ = unmount(&mount, UnmountFlags::DETACH);
        }
        self.cgroups.remove_all();
        for socket in self.sockets.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            _ = fs::remove_file(socket);
        }
    }
}

fn kill(pid: u32) {
    // Fails only for one that is gone.
    _ = Pid::from_raw(pid.cast_signed()).map(|pid| kill_process(pid, Signal::KILL));
}
