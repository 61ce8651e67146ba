//! Cgroups, version 1 and 2: figures for `kubectl top`, out-of-memory kills, and a place for the compiler.

use anyhow::{Context as _, Result};
use containerd_shim::protos::cgroups::metrics as v1;
use containerd_shim::protos::cgroups_v2::metrics as v2;
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::util::convert_to_any;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// The key of version 2's one folder.
const UNIFIED: &str = "";

/// A cgroup: a folder for each controller in version 1, one for all in version 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    folders: BTreeMap<String, PathBuf>,
}

/// A cgroup that goes with this.
#[derive(Debug)]
pub struct Temporary(Cgroup);

impl Cgroup {
    /// The cgroup of a running process.
    ///
    /// # Errors
    /// The process has gone.
    pub fn of(pid: Pid) -> Result<Self> {
        let file = format!("/proc/{}/cgroup", pid.as_raw_nonzero());
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        Ok(Self::parse(&text, is_unified()))
    }

    /// The cgroup at `path`, as the specification of a container gives it, under all controllers that there are.
    pub fn at(path: &str) -> Self {
        let path = expand(path);
        if is_unified() {
            return Self::parse(&format!("0::{path}"), true);
        }
        let controllers = ["cpu", "cpuacct", "memory", "pids"];
        let mounted = controllers.into_iter().filter(|controller| Path::new(ROOT).join(controller).is_dir());
        let lines: Vec<_> = mounted.map(|controller| format!("1:{controller}:{path}")).collect();
        Self::parse(&lines.join("\n"), false)
    }

    /// Reads lines of `/proc/PID/cgroup`.
    fn parse(text: &str, unified: bool) -> Self {
        let mut folders = BTreeMap::new();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let path = path.trim_start_matches('/');
            if unified && controllers.is_empty() {
                folders.insert(UNIFIED.into(), Path::new(ROOT).join(path));
            }
            for controller in controllers.split(',').filter(|name| !unified && !name.is_empty() && !name.contains('='))
            {
                folders.insert(controller.into(), Path::new(ROOT).join(controller).join(path));
            }
        }
        Self { folders }
    }

    /// The cgroup that this one is in: of a pod's container, the pod's.
    pub fn parent(&self) -> Self {
        let parent = |path: &PathBuf| path.parent().map_or_else(|| path.clone(), Path::to_path_buf);
        Self { folders: self.folders.iter().map(|(name, path)| (name.clone(), parent(path))).collect() }
    }

    /// Makes a cgroup in this one.
    ///
    /// # Errors
    /// A folder cannot be made.
    pub fn make(&self, name: &str) -> Result<Temporary> {
        let mut made = Temporary(Self { folders: BTreeMap::new() });
        // A new cpuset is empty, and takes no process before it is filled.
        for (controller, folder) in self.folders.iter().filter(|(controller, _)| *controller != "cpuset") {
            let folder = folder.join(name);
            fs::create_dir_all(&folder).with_context(|| format!("make cgroup {}", folder.display()))?;
            made.0.folders.insert(controller.clone(), folder);
        }
        Ok(made)
    }

    /// Its folders.
    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        self.folders.values().map(PathBuf::as_path)
    }

    fn folder(&self, controller: &str) -> &Path {
        let folder = self.folders.get(UNIFIED).or_else(|| self.folders.get(controller));
        folder.map_or(Path::new("/nowhere"), PathBuf::as_path)
    }

    fn is_unified(&self) -> bool {
        self.folders.contains_key(UNIFIED)
    }

    /// How many of its processes the kernel has killed for want of memory, in version 2 with those of cgroups that are
    /// or were below it. `None` if it is gone.
    pub fn oom_kills(&self) -> Option<u64> {
        let file = if self.is_unified() { "memory.events" } else { "memory.oom_control" };
        table(&self.folder("memory").join(file)).get("oom_kill").copied()
    }

    /// Its processes, those in cgroups below it too.
    pub fn processes(&self) -> Vec<Pid> {
        let mut processes = Vec::new();
        let mut folders = vec![self.folder("pids").to_path_buf()];
        while let Some(folder) = folders.pop() {
            let list = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            processes.extend(list.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)));
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            folders.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
        processes
    }

    /// Kills all of its processes.
    pub fn kill(&self) {
        for pid in self.processes() {
            // It may be gone already.
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// The figures that containerd passes on to the kubelet.
    ///
    /// # Errors
    /// They cannot be encoded.
    pub fn metrics(&self) -> Result<Any> {
        let metrics = if self.is_unified() {
            convert_to_any(Box::new(self.metrics_v2()))
        } else {
            convert_to_any(Box::new(self.metrics_v1()))
        };
        metrics.context("encode the metrics")
    }

    fn metrics_v1(&self) -> v1::Metrics {
        let (cpu, memory, pids) = (self.folder("cpuacct"), self.folder("memory"), self.folder("pids"));
        let per_cpu = fs::read_to_string(cpu.join("cpuacct.usage_percpu")).unwrap_or_default();
        // In ticks of a hundredth of a second, which is what user space is told whatever the kernel does.
        let times = table(&cpu.join("cpuacct.stat"));
        let usage = v1::CPUUsage {
            total: number(&cpu.join("cpuacct.usage")),
            user: entry(&times, "user") * 10_000_000,
            kernel: entry(&times, "system") * 10_000_000,
            per_cpu: per_cpu.split_whitespace().filter_map(|time| time.parse().ok()).collect(),
            ..Default::default()
        };
        let throttling = table(&self.folder("cpu").join("cpu.stat"));
        let throttling = v1::Throttle {
            periods: entry(&throttling, "nr_periods"),
            throttled_periods: entry(&throttling, "nr_throttled"),
            throttled_time: entry(&throttling, "throttled_time"),
            ..Default::default()
        };
        let stat = table(&memory.join("memory.stat"));
        let memory = v1::MemoryStat {
            usage: MessageField::some(v1::MemoryEntry {
                usage: number(&memory.join("memory.usage_in_bytes")),
                limit: number(&memory.join("memory.limit_in_bytes")),
                max: number(&memory.join("memory.max_usage_in_bytes")),
                failcnt: number(&memory.join("memory.failcnt")),
                ..Default::default()
            }),
            cache: entry(&stat, "cache"),
            rss: entry(&stat, "rss"),
            mapped_file: entry(&stat, "mapped_file"),
            pg_fault: entry(&stat, "pgfault"),
            pg_maj_fault: entry(&stat, "pgmajfault"),
            inactive_file: entry(&stat, "inactive_file"),
            active_file: entry(&stat, "active_file"),
            total_cache: entry(&stat, "total_cache"),
            total_rss: entry(&stat, "total_rss"),
            total_pg_fault: entry(&stat, "total_pgfault"),
            total_pg_maj_fault: entry(&stat, "total_pgmajfault"),
            total_inactive_file: entry(&stat, "total_inactive_file"),
            total_active_file: entry(&stat, "total_active_file"),
            ..Default::default()
        };
        let current = number(&pids.join("pids.current"));
        let pids = v1::PidsStat { current, limit: number(&pids.join("pids.max")), ..Default::default() };
        v1::Metrics {
            cpu: MessageField::some(v1::CPUStat {
                usage: MessageField::some(usage),
                throttling: MessageField::some(throttling),
                ..Default::default()
            }),
            memory: MessageField::some(memory),
            pids: MessageField::some(pids),
            ..Default::default()
        }
    }

    fn metrics_v2(&self) -> v2::Metrics {
        let folder = self.folder(UNIFIED);
        let (cpu, stat) = (table(&folder.join("cpu.stat")), table(&folder.join("memory.stat")));
        let events = table(&folder.join("memory.events"));
        let cpu = v2::CPUStat {
            usage_usec: entry(&cpu, "usage_usec"),
            user_usec: entry(&cpu, "user_usec"),
            system_usec: entry(&cpu, "system_usec"),
            nr_periods: entry(&cpu, "nr_periods"),
            nr_throttled: entry(&cpu, "nr_throttled"),
            throttled_usec: entry(&cpu, "throttled_usec"),
            ..Default::default()
        };
        let memory = v2::MemoryStat {
            usage: number(&folder.join("memory.current")),
            usage_limit: number(&folder.join("memory.max")),
            anon: entry(&stat, "anon"),
            file: entry(&stat, "file"),
            kernel_stack: entry(&stat, "kernel_stack"),
            slab: entry(&stat, "slab"),
            sock: entry(&stat, "sock"),
            shmem: entry(&stat, "shmem"),
            file_mapped: entry(&stat, "file_mapped"),
            inactive_file: entry(&stat, "inactive_file"),
            active_file: entry(&stat, "active_file"),
            inactive_anon: entry(&stat, "inactive_anon"),
            active_anon: entry(&stat, "active_anon"),
            pgfault: entry(&stat, "pgfault"),
            pgmajfault: entry(&stat, "pgmajfault"),
            ..Default::default()
        };
        let events = v2::MemoryEvents {
            high: entry(&events, "high"),
            max: entry(&events, "max"),
            oom: entry(&events, "oom"),
            oom_kill: entry(&events, "oom_kill"),
            ..Default::default()
        };
        let (current, limit) = (number(&folder.join("pids.current")), number(&folder.join("pids.max")));
        v2::Metrics {
            cpu: MessageField::some(cpu),
            memory: MessageField::some(memory),
            memory_events: MessageField::some(events),
            pids: MessageField::some(v2::PidsStat { current, limit, ..Default::default() }),
            ..Default::default()
        }
    }
}

impl Temporary {
    /// The cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        for folder in self.0.folders.values() {
            // One that is still in use goes with the pod's.
            let _ = fs::remove_dir(folder);
        }
    }
}

fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The path for `SLICE:PREFIX:NAME`: systemd puts the slice `a-b.slice` into the slice `a.slice`.
fn expand(path: &str) -> String {
    let mut fields = path.splitn(3, ':');
    let (Some(slice), Some(prefix), Some(name)) = (fields.next(), fields.next(), fields.next()) else {
        return path.into();
    };
    let stem = slice.trim_end_matches(".slice");
    let ends = stem.match_indices('-').map(|(end, _)| end).chain([stem.len()]);
    let slices: String = ends.map(|end| format!("/{}.slice", &stem[..end])).collect();
    format!("{slices}/{prefix}-{name}.scope")
}

/// The number in a file; the greatest there is for `max`, and 0 if there is none.
fn number(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    if text.trim() == "max" { u64::MAX } else { text.trim().parse().unwrap_or_default() }
}

/// The lines of a file, each a name and a number.
fn table(file: &Path) -> HashMap<String, u64> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.filter_map(|(name, value)| Some((name.into(), value.trim().parse().ok()?))).collect()
}

fn entry(table: &HashMap<String, u64>, name: &str) -> u64 {
    table.get(name).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_says_where_its_cgroups_are() {
        let lines = "4:memory:/kubepods/pod1/c1\n3:cpu,cpuacct:/kubepods/pod1/c1\n1:name=systemd:/x\n0::/other\n";
        let folders = |cgroup: &Cgroup| cgroup.folders().map(|path| path.display().to_string()).collect::<Vec<_>>();
        let cgroup = Cgroup::parse(lines, false);
        let expected = ["cpu", "cpuacct", "memory"].map(|name| format!("/sys/fs/cgroup/{name}/kubepods/pod1/c1"));
        assert_eq!(folders(&cgroup), expected);
        let parent = ["cpu", "cpuacct", "memory"].map(|name| format!("/sys/fs/cgroup/{name}/kubepods/pod1"));
        assert_eq!(folders(&cgroup.parent()), parent);
        assert_eq!(folders(&Cgroup::parse(lines, true)), ["/sys/fs/cgroup/other"]);
    }

    #[test]
    fn systemd_nests_slices() {
        assert_eq!(expand("/kubepods/pod1/c1"), "/kubepods/pod1/c1");
        let scope = "/kubepods.slice/kubepods-besteffort.slice/cri-containerd-c1.scope";
        assert_eq!(expand("kubepods-besteffort.slice:cri-containerd:c1"), scope);
        assert_eq!(expand("system.slice:runc:c1"), "/system.slice/runc-c1.scope");
    }
}
