//! What is left of pods: processes, mounts. Cgroups and sockets are looked for where they are made.

use std::fs;
use std::path::{Path, PathBuf};

/// A process that belongs to a node: by its command line or its working directory, which name the node's folder, or
/// by its cgroup.
#[derive(Debug)]
pub struct Found {
    /// Its id.
    pub pid: u32,
    /// Its command line, with blanks between the words.
    pub command: String,
}

/// All processes that live and have to do with `folder`, or are in a cgroup that has `cgroup` in its path. Those that
/// ended and were not waited for are none of them.
pub fn processes(folder: &Path, cgroup: &str) -> Vec<Found> {
    let folder = folder.to_string_lossy();
    let mut found = Vec::new();
    for entry in Path::new("/proc").read_dir().into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let text = |file: &str| String::from_utf8_lossy(&read(file)).into_owned();
        let command = text("cmdline").replace('\0', " ");
        let works_in = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let is_of_node = command.contains(&*folder)
            || works_in.to_string_lossy().contains(&*folder)
            || text("cgroup").lines().any(|line| line.contains(cgroup));
        // `1 (name) Z …`: the name may hold anything, a parenthesis too.
        let stat = text("stat");
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if is_of_node && !matches!(state, None | Some('Z' | 'X')) {
            found.push(Found { pid, command });
        }
    }
    found
}

/// All mount points below `folder` that a process sees, which is `self` or a number; the deepest first.
pub fn mounts(process: &str, folder: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string(format!("/proc/{process}/mounts")).unwrap_or_default();
    let points = mounts.lines().filter_map(|mount| mount.split(' ').nth(1)).map(PathBuf::from);
    let mut found: Vec<PathBuf> = points.filter(|point| point.starts_with(folder)).collect();
    found.sort();
    found.reverse();
    found
}
