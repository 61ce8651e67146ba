//! How much room the machine leaves: memory, by the limits of control groups; mappings and address space, by those of
//! the process. And what room the start took that is not needed any more.

use rustix::mm::{Advice, madvise};
use rustix::process::{Resource, getrlimit};
use std::ffi::c_void;
use std::ops::Range;
use std::path::Path;
use std::{fs, io, ptr};

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

/// Lets go of the pages of the executable's code and constants. Those in use come back, at their next use, from the page
/// cache; those that only the start needed do not.
///
/// # Errors
/// The kernel does not say where they are, or refuses.
pub fn give_back_code() -> io::Result<()> {
    let executable = fs::read_link("/proc/self/exe")?;
    for line in fs::read_to_string("/proc/self/maps")?.lines() {
        let Some(Range { start, end }) = code_of(line, &executable) else { continue };
        let at: *mut c_void = ptr::with_exposed_provenance_mut(start);
        // SAFETY: the mapping is one of a file, private, and was never written to: nothing in it depends on where it lies,
        // so the loader leaves it as it is. What is dropped comes back as it was, from the file.
        unsafe { madvise(at, end - start, Advice::LinuxDontNeed) }?;
    }
    Ok(())
}

/// Where code or constants of `executable` lie, if it is those which a line of /proc/self/maps (proc(5)) tells of.
///
/// Constants stand at the beginning of the file. Others that cannot be written to had addresses put into them first.
fn code_of(line: &str, executable: &Path) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (permissions, offset, path) = (fields.next()?, fields.next()?, fields.nth(2)?);
    let number = |digits| usize::from_str_radix(digits, 16).ok();
    let never_written = permissions == "r-xp" || permissions == "r--p" && number(offset)? == 0;
    (never_written && Path::new(path) == executable).then_some(number(start)?..number(end)?)
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
    fn only_code_of_the_executable_is_given_back() {
        let code = "5581d2e45000-5581d3939000 r-xp 002d4000 fe:01 1234      /opt/mailroom/host";
        let other = |from: &str, to: &str| code_of(&code.replace(from, to), Path::new("/opt/mailroom/host"));
        assert_eq!(other("", ""), Some(0x5581_d2e4_5000..0x5581_d393_9000));
        assert_eq!(other("r-xp 002d4000", "r--p 00000000"), Some(0x5581_d2e4_5000..0x5581_d393_9000));
        assert_eq!(other("r-xp", "r--p"), None);
        assert_eq!(other("r-xp", "rw-p"), None);
        assert_eq!(other("/opt/mailroom/host", "/opt/triage.cwasm"), None);
        assert_eq!(other("/opt/mailroom/host", ""), None);
        // This test goes on after it.
        give_back_code().expect("given back");
    }

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
