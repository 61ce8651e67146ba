//! The cgroups of a node's pods, made and removed as a kubelet does it, for cgroup v1 and v2 alike.

use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// All cgroups of one node, in every hierarchy of the system: `/NAME/podUID/CONTAINER`.
#[derive(Debug)]
pub struct Cgroups {
    name: String,
    hierarchies: Vec<Hierarchy>,
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

impl Cgroups {
    /// The cgroups below `/NAME`, of which there are none yet.
    ///
    /// # Errors
    /// When no cgroups are mounted.
    pub fn new(name: &str) -> Result<Self> {
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
        Ok(Self { name: name.to_owned(), hierarchies })
    }

    /// The first part of all their names.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes the cgroup of a pod and returns its path, as CRI takes it for `cgroup_parent`.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn make_pod(&self, uid: &str, limits: Limits) -> Result<String> {
        for hierarchy in &self.hierarchies {
            let top = hierarchy.folder.join(&self.name);
            let pod = top.join(format!("pod{uid}"));
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
        Ok(format!("/{}/pod{uid}", self.name))
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
        let cgroups = format!("/proc/{pid}/cgroup");
        let cgroups = fs::read_to_string(&cgroups).with_context(|| format!("read {cgroups}"))?;
        let path = cgroups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|controller| controller == wanted).then_some(path)
        });
        let path = path.with_context(|| format!("process {pid} has no cgroup of {wanted}"))?;
        let file = hierarchy.folder.join(path.trim_start_matches('/')).join(file);
        let value = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Ok(value.trim().to_owned())
    }

    /// The cgroups that are left below those of pods.
    pub fn of_containers(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for top in self.tops() {
            found.extend(folders(&top).iter().flat_map(|pod| folders(pod)));
        }
        found
    }

    /// Removes the cgroup of a pod, which must have no containers.
    ///
    /// # Errors
    /// When there is something in it still.
    pub fn remove_pod(&self, uid: &str) -> Result<()> {
        for top in self.tops() {
            let pod = top.join(format!("pod{uid}"));
            if pod.exists() {
                fs::remove_dir(&pod).with_context(|| format!("remove the cgroup {}", pod.display()))?;
            }
        }
        Ok(())
    }

    /// Removes all cgroups of the node, whatever they have in them but processes that live on.
    pub fn remove_all(&self) {
        let end = Instant::now() + EMPTY_DEADLINE;
        for top in self.tops() {
            while top.exists() && Instant::now() < end {
                remove_tree(&top);
            }
        }
    }

    fn tops(&self) -> impl Iterator<Item = PathBuf> {
        self.hierarchies.iter().map(|hierarchy| hierarchy.folder.join(&self.name))
    }
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
