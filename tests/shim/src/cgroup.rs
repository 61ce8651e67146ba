//! The cgroups of a node's pods, made and removed as a kubelet does it, for cgroup v1 and v2 alike.

use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tests::tools;

/// All cgroups of one node, in every hierarchy of the system.
#[derive(Debug)]
pub struct Cgroups {
    name: String,
    driver: Driver,
    hierarchies: Vec<Hierarchy>,
}

/// Who makes them; a kubelet has a setting of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The kubelet and the OCI runtime themselves: `/NAME/podUID/CONTAINER`.
    Cgroupfs,
    /// systemd for them: `/NAME.slice/NAME-burstable.slice/NAME-burstable-podUID.slice/cri-containerd-CONTAINER.scope`.
    Systemd,
    /// A real kubelet: `/NAME/kubepods/burstable/podUID/CONTAINER`. Pods are not made here then.
    Kubelet,
}

#[derive(Debug)]
struct Hierarchy {
    /// `memory`, `cpu` and so on; empty for that of version 2.
    controllers: Vec<String>,
    folder: PathBuf,
}

/// What a pod may use in all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Bytes of memory; 0 for no limit.
    pub memory: i64,
    /// Thousandths of a core; 0 for no limit.
    pub millicores: i64,
}

/// A killed process leaves its cgroup a moment later.
const EMPTY_DEADLINE: Duration = Duration::from_secs(5);

const PERIOD_MICROSECONDS: i64 = 100_000;

/// Where systemd finds units that do not outlive the machine's run.
const UNITS: &str = "/run/systemd/system";

impl Cgroups {
    /// The cgroups of the node `name`, of which there are none yet.
    ///
    /// # Errors
    /// When no cgroups are mounted, or systemd does not run.
    pub fn new(name: &str, driver: Driver) -> Result<Self> {
        ensure!(
            driver != Driver::Systemd || Path::new(UNITS).is_dir(),
            "systemd is not this machine's init; `cargo xtask test-cgroup2` makes one where it is"
        );
        let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
        let mut hierarchies = Vec::new();
        for mount in mounts.lines() {
            let fields: Vec<&str> = mount.split(' ').collect();
            if let [_, folder, kind @ ("cgroup" | "cgroup2"), options, ..] = fields[..] {
                let controllers = match kind {
                    "cgroup" => options.split(',').map(str::to_owned).collect(),
                    _ => Vec::new(),
                };
                hierarchies.push(Hierarchy { controllers, folder: folder.into() });
            }
        }
        if hierarchies.is_empty() {
            bail!("no cgroups are mounted below /sys/fs/cgroup");
        }
        // A dash in the name of a slice stands for one slice in another.
        let name = if driver == Driver::Systemd { name.replace('-', "_") } else { name.to_owned() };
        Ok(Self { name, driver, hierarchies })
    }

    /// The first part of all their paths.
    pub fn first(&self) -> String {
        match self.driver {
            Driver::Cgroupfs | Driver::Kubelet => self.name.clone(),
            Driver::Systemd => format!("{}.slice", self.name),
        }
    }

    /// The path of a pod's, as CRI takes it for `cgroup_parent`.
    pub fn path_of_pod(&self, uid: &str) -> String {
        format!("{}/{}", self.path_of_pods(), self.pod(uid))
    }

    fn path_of_pods(&self) -> String {
        match self.driver {
            Driver::Cgroupfs => format!("/{}", self.name),
            Driver::Systemd => format!("/{0}.slice/{0}-burstable.slice", self.name),
            Driver::Kubelet => format!("/{}/kubepods/burstable", self.name),
        }
    }

    /// The last part of the path of a pod's.
    fn pod(&self, uid: &str) -> String {
        match self.driver {
            Driver::Cgroupfs | Driver::Kubelet => format!("pod{uid}"),
            Driver::Systemd => format!("{}-burstable-pod{}.slice", self.name, uid.replace('-', "_")),
        }
    }

    /// Makes the cgroup of a pod and returns its path.
    ///
    /// # Errors
    /// When the kernel or systemd refuses it.
    pub fn make_pod(&self, uid: &str, limits: Limits) -> Result<String> {
        match self.driver {
            Driver::Cgroupfs => self.make_folders(&self.pod(uid), limits)?,
            Driver::Systemd => start_slice(&self.pod(uid), limits)?,
            Driver::Kubelet => bail!("the kubelet makes the cgroups of pods"),
        }
        Ok(self.path_of_pod(uid))
    }

    fn make_folders(&self, pod: &str, limits: Limits) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let top = hierarchy.folder.join(&self.name);
            let pod = top.join(pod);
            fs::create_dir_all(&pod).with_context(|| format!("make the cgroup {}", pod.display()))?;
            let quota = limits.millicores * PERIOD_MICROSECONDS / 1000;
            if self.version_2() {
                for folder in [&hierarchy.folder, &top] {
                    hand_down(folder)?;
                }
                set(&pod, "memory.max", limits.memory)?;
                set(&pod, "cpu.max", quota)?;
            } else {
                set(&pod, "memory.limit_in_bytes", limits.memory)?;
                set(&pod, "cpu.cfs_quota_us", quota)?;
            }
        }
        Ok(())
    }

    /// Whether there is version 2 alone; beside version 1 it has no controllers.
    fn version_2(&self) -> bool {
        self.hierarchies.iter().all(|hierarchy| hierarchy.controllers.is_empty())
    }

    /// What the cgroup of a process has in its file `version_1` of the hierarchy of `controller`, or in `version_2`.
    ///
    /// # Errors
    /// When the process is gone or the file is not there.
    pub fn of_process(&self, pid: u32, controller: &str, version_1: &str, version_2: &str) -> Result<String> {
        let (wanted, file) = if self.version_2() { ("", version_2) } else { (controller, version_1) };
        let hierarchy = |hierarchy: &&Hierarchy| match wanted {
            "" => hierarchy.controllers.is_empty(),
            _ => hierarchy.controllers.iter().any(|controller| controller == wanted),
        };
        let hierarchy = self.hierarchies.iter().find(hierarchy).with_context(|| format!("no cgroup of {wanted}"))?;
        let path = self.path_of_process(pid, controller)?;
        let file = hierarchy.folder.join(path.trim_start_matches('/')).join(file);
        let value = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Ok(value.trim().to_owned())
    }

    /// The path of a process's cgroup in the hierarchy of `controller`, or of version 2.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn path_of_process(&self, pid: u32, controller: &str) -> Result<String> {
        let wanted = if self.version_2() { "" } else { controller };
        let cgroups = format!("/proc/{pid}/cgroup");
        let cgroups = fs::read_to_string(&cgroups).with_context(|| format!("read {cgroups}"))?;
        let path = cgroups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|controller| controller == wanted).then_some(path)
        });
        path.map(str::to_owned).with_context(|| format!("process {pid} has no cgroup of {controller}"))
    }

    /// Makes the cgroup that all others of the node are in, which a kubelet wants to find.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn make_first(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let first = hierarchy.folder.join(self.first());
            fs::create_dir_all(&first).with_context(|| format!("make the cgroup {}", first.display()))?;
            if self.version_2() {
                hand_down(&hierarchy.folder)?;
            }
        }
        Ok(())
    }

    /// The cgroups that are left below those of pods, or, where a kubelet removes those too, the pods' themselves.
    pub fn of_containers(&self) -> Vec<PathBuf> {
        if self.driver == Driver::Kubelet {
            return self.hierarchies.iter().flat_map(|hierarchy| self.left_by_kubelet(hierarchy)).collect();
        }
        let mut found = Vec::new();
        for top in self.tops() {
            found.extend(folders(&top).iter().flat_map(|pod| folders(pod)));
        }
        found
    }

    /// The cgroups of pods in a hierarchy. Beside version 1 a kubelet does not know of version 2, so those that the OCI
    /// runtime makes there stay; what counts is what is in them.
    fn left_by_kubelet(&self, hierarchy: &Hierarchy) -> Vec<PathBuf> {
        let all = hierarchy.folder.join(self.first()).join("kubepods");
        let classes = folders(&all).into_iter().chain([all]);
        let is_pod =
            |folder: &PathBuf| folder.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"pod"));
        let pods = classes.flat_map(|class| folders(&class)).filter(is_pod);
        if hierarchy.controllers.is_empty() && !self.version_2() {
            pods.flat_map(|pod| folders(&pod)).collect()
        } else {
            pods.collect()
        }
    }

    /// Removes the cgroup of a pod, which must have no containers.
    ///
    /// # Errors
    /// When there is something in it still.
    pub fn remove_pod(&self, uid: &str) -> Result<()> {
        for top in self.tops() {
            let pod = top.join(self.pod(uid));
            if !pod.exists() {
                continue;
            }
            match self.driver {
                Driver::Cgroupfs | Driver::Kubelet => {
                    fs::remove_dir(&pod).with_context(|| format!("remove the cgroup {}", pod.display()))?;
                }
                Driver::Systemd => {
                    let left = folders(&pod);
                    ensure!(left.is_empty(), "not removed: {left:?}");
                    stop_slice(&self.pod(uid))?;
                }
            }
        }
        Ok(())
    }

    /// Removes all cgroups of the node, whatever they have in them but processes that live on.
    pub fn remove_all(&self) {
        if self.driver == Driver::Systemd {
            for pod in self.tops().flat_map(|top| folders(&top)) {
                // What systemd leaves is removed like any cgroup.
                _ = stop_slice(&pod.file_name().unwrap_or_default().to_string_lossy());
            }
            _ = systemctl(&["stop", &self.first()]);
        }
        let end = Instant::now() + EMPTY_DEADLINE;
        for hierarchy in &self.hierarchies {
            let first = hierarchy.folder.join(self.first());
            while first.exists() && Instant::now() < end {
                remove_tree(&first);
            }
        }
    }

    /// What the pods' are in.
    fn tops(&self) -> impl Iterator<Item = PathBuf> {
        let pods = self.path_of_pods();
        self.hierarchies.iter().map(move |hierarchy| hierarchy.folder.join(pods.trim_start_matches('/')))
    }
}

/// Has systemd make a slice, with those that it is in.
fn start_slice(name: &str, Limits { memory, millicores }: Limits) -> Result<()> {
    let mut unit = "[Unit]\nDefaultDependencies=no\n[Slice]\nCPUAccounting=yes\nMemoryAccounting=yes\n".to_owned();
    if memory != 0 {
        unit += &format!("MemoryMax={memory}\n");
    }
    if millicores != 0 {
        unit += &format!("CPUQuota={}%\n", millicores / 10);
    }
    let file = Path::new(UNITS).join(name);
    fs::write(&file, unit).with_context(|| format!("write {}", file.display()))?;
    systemctl(&["start", name]).map(drop)
}

fn stop_slice(name: &str) -> Result<()> {
    let file = Path::new(UNITS).join(name);
    fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    systemctl(&["stop", name]).map(drop)
}

/// Asks systemd for something and returns what it answers.
///
/// # Errors
/// When it refuses.
pub fn systemctl(args: &[&str]) -> Result<String> {
    let output =
        Command::new(tools::installed("systemctl", "systemd")?).args(args).output().context("start systemctl")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "systemctl {}: {}", args.join(" "), errors.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Lets the cgroups below `folder` have the controllers of version 2 that it has.
fn hand_down(folder: &Path) -> Result<()> {
    let available = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        let file = folder.join("cgroup.subtree_control");
        fs::write(&file, format!("+{controller}")).with_context(|| format!("+{controller} > {}", file.display()))?;
    }
    Ok(())
}

/// Sets a limit where this hierarchy has it and there is one.
fn set(cgroup: &Path, file: &str, limit: i64) -> Result<()> {
    let file = cgroup.join(file);
    if limit == 0 || !file.exists() {
        return Ok(());
    }
    fs::write(&file, limit.to_string()).with_context(|| format!("{limit} > {}", file.display()))
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Deepest first; one that still has a process stays.
fn remove_tree(folder: &Path) {
    for child in folders(folder) {
        remove_tree(&child);
    }
    _ = fs::remove_dir(folder);
}
