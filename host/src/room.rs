//! How much room the machine leaves: memory, by the limits of control groups; mappings and address space, by those of
//! the process.

use rustix::process::{Resource, getrlimit};
use std::fs;
use std::path::Path;

/// The lowest limit on memory among the control groups that this process is in, in bytes, of either version
/// (cgroups(7)). Nothing where there is no limit, or none that shows.
pub fn memory_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    memory_limit_of(&groups, Path::new("/sys/fs/cgroup"))
}

/// Most memory mappings that a process may have.
pub fn mappings_max() -> Option<u64> {
    fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()
}

/// Most address space that this process may have, in bytes; nothing where there is no limit.
pub fn address_space_max() -> Option<u64> {
    getrlimit(Resource::As).current
}

fn memory_limit_of(groups: &str, mounted: &Path) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (root, file) = match controllers {
            "" => (mounted.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (mounted.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        // Those above limit it as well. In a container the path may be the one outside, and what it is here is the root.
        let own = root.join(path.trim_start_matches('/'));
        let above = own.ancestors().take_while(|folder| folder.starts_with(&root));
        above.filter_map(|folder| fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()).min()
    });
    // Version 1 says so much where there is no limit.
    limits.min().filter(|limit| *limit < i64::MAX as u64 / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_counts() {
        let mounted = tempfile::tempdir().expect("a folder");
        for (file, limit) in [
            ("memory.max", "max"),
            ("pods/memory.max", "134217728"),
            ("pods/pod/memory.max", "max"),
            ("memory/memory.limit_in_bytes", "9223372036854771712"),
            ("memory/pods/memory.limit_in_bytes", "67108864"),
        ] {
            let file = mounted.path().join(file);
            fs::create_dir_all(file.parent().expect("a folder")).expect("make it");
            fs::write(file, format!("{limit}\n")).expect("write");
        }
        for (groups, expected) in [
            ("0::/pods/pod\n", Some(134_217_728)),
            ("0::/pods\n", Some(134_217_728)),
            ("0::/\n", None),
            ("0::/unseen/here\n", None),
            ("3:cpuset:/pods\n2:memory,hugetlb:/pods/pod\n0::/\n", Some(67_108_864)),
            ("2:memory:/\n", None),
            ("2:memory:/pods\n0::/pods/pod\n", Some(67_108_864)),
            ("3:cpuset:/pods\n", None),
            ("nonsense", None),
        ] {
            assert_eq!(memory_limit_of(groups, mounted.path()), expected, "{groups}");
        }
    }
}
