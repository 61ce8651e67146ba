//! Compiles the component on standard input and writes the `.cwasm` to standard output.
//!
//! The shim starts it as root, with the folders of a cgroup of the pod's as arguments, which it joins. Before it reads a byte it gives up all that a hostile component
//! could want of it: the network, the files, the user, and gaining them back. What is left is a process that can
//! compute, read its input and write its output.

use anyhow::{Context as _, Result, ensure};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, chdir, chroot, getuid, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    Gid, Uid, UnshareFlags, set_no_new_privs, set_thread_gid, set_thread_groups, set_thread_uid, unshare_unsafe,
};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

/// The user and the group `nobody`.
const NOBODY: u32 = 65534;

/// The largest component that is compiled, in bytes. Those of Python are about 20 MB.
const COMPONENT_BYTES_MAX: u64 = 256 << 20;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let folders: Vec<_> = std::env::args_os().skip(1).collect();
    if let [word] = &folders[..] {
        let answer = match word.to_str() {
            Some("--engine") => Some(host::engine_id()?),
            Some("--version") => Some(format!("mailroom-compiler {}", version::LONG)),
            Some("-V") => Some(format!("mailroom-compiler {}", version::SHORT)),
            _ => None,
        };
        if let Some(answer) = answer {
            println!("{answer}");
            return Ok(());
        }
    }
    for folder in folders {
        let file = Path::new(&folder).join("cgroup.procs");
        std::fs::write(&file, "0").with_context(|| format!("join cgroup {}", file.display()))?;
    }
    confine().context("confine the compiler")?;
    let mut component = Vec::new();
    let mut input = std::io::stdin().lock().take(COMPONENT_BYTES_MAX + 1);
    input.read_to_end(&mut component).context("read the component")?;
    ensure!(component.len() as u64 <= COMPONENT_BYTES_MAX, "is larger than {COMPONENT_BYTES_MAX} bytes");
    let machine_code = host::compile(&component)?;
    let mut output = std::io::stdout().lock();
    output.write_all(&machine_code).and_then(|()| output.flush()).context("write the machine code")
}

/// Gives up everything but computing. The working directory becomes the root of all files; the shim makes it empty.
fn confine() -> Result<()> {
    ensure!(getuid().is_root(), "only root can be confined; `host compile` is for all others");
    set_parent_process_death_signal(Some(Signal::KILL)).context("end with the shim")?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).context("leave no core file")?;
    // SAFETY: no file descriptor table is unshared, which alone could pull descriptors from under safe code.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS) }
        .context("leave the network")?;
    chroot(".").and_then(|()| chdir("/")).context("leave the files")?;
    // One thread so far, and the others inherit from it.
    set_thread_groups(&[]).context("leave the groups")?;
    set_thread_gid(Gid::from_raw(NOBODY)).context("leave the group")?;
    set_thread_uid(Uid::from_raw(NOBODY)).context("become nobody")?;
    set_no_new_privs(true).context("stay nobody")?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("be nobody else's to look into")
}
