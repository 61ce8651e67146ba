//! The tests of the shim on a machine that has cgroup version 2 alone, whatever this one has: virtual machines made
//! for them, which QEMU emulates.
//!
//! Such a machine has one processor and no disk, and a shell script as its first process; one more has systemd, for the
//! tests that say that they need it. Its clock counts the instructions that it has done, not the time that
//! it took to emulate them: however slow this machine is, no deadline of a test comes early.

use crate::initramfs::Initramfs;
use crate::step::{self, Result, Workspace};
use crate::{node, tools};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

/// What the tests call by name.
const PROGRAMS: [&str; 8] = ["containerd", "containerd-shim-runc-v2", "ctr", "runc", "crun", "ip", "bash", "script"];

/// Where the distribution has the CNI plugins, and the tests look for them.
const PLUGINS: &str = "/usr/lib/cni";

/// Those that the tests use.
const PLUGINS_USED: [&str; 3] = ["bridge", "host-local", "loopback"];

/// The kernel's modules, in the order in which they need each other.
const MODULES: [&str; 5] = [
    "kernel/net/llc/llc.ko",
    "kernel/net/802/stp.ko",
    "kernel/net/bridge/bridge.ko",
    "kernel/drivers/net/veth.ko",
    "kernel/fs/overlayfs/overlay.ko",
];

/// Where all files are at first: the root that the kernel unpacks them to is one that runc cannot leave.
const MACHINE: &str = "/machine";

/// The first process: moves all files to an ordinary root, and goes on there with `first`, an argument of the kernel.
const INIT: &str = "#!/bin/busybox sh
set -e
/bin/busybox mkdir -p /root
/bin/busybox mount -t tmpfs -o size=90%,mode=755 root /root
/bin/busybox cp -a /machine/. /root/
exec /bin/busybox switch_root /root $first
";

/// The first process from then on, without systemd: does what an init does for services.
const FIRST: &str = "/first";
const FIRST_SCRIPT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devices /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
chmod 1777 /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo +$controller > /sys/fs/cgroup/cgroup.subtree_control
done
exec /run-tests
";

/// Runs `/share.N`, whose `N` is an argument of the kernel. The second serial line takes its exit code.
const RUN_TESTS: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin HOME=/root
chmod 1777 /tmp
for module in /modules/*; do insmod $module; done
ip link set lo up
echo \"Linux $(uname -r), cgroup version 2 with $(cat /sys/fs/cgroup/cgroup.subtree_control), $(cat /proc/1/comm)\"
for word in $(cat /proc/cmdline); do
    case $word in share=*) script=/share.${word#share=} ;; esac
done
$script
echo $? > /dev/ttyS1
poweroff -f
";

/// The same for systemd: the one unit that it starts.
const UNIT: &str = "tests.service";
const UNIT_FILE: &str = "[Unit]
DefaultDependencies=no
[Service]
ExecStart=/run-tests
StandardOutput=file:/dev/console
StandardError=file:/dev/console
";

/// For all files twice, while they are moved, and for the pods.
const MEMORY_MIB: u32 = 4096;

/// Ends a machine that hangs.
const TIME_LIMIT_SECONDS: u32 = 40 * 60;

/// Builds what the tests of the shim need, and runs them; those named in `filters`, if any.
pub fn test(workspace: &Workspace, nats_server: Option<PathBuf>, filters: &[OsString]) -> Result<()> {
    node::ensure_packages()?;
    let qemu = tools::qemu()?;
    let machine = Machine {
        kernel: tools::kernel(workspace)?,
        busybox: tools::busybox(workspace)?,
        nats_server: tools::nats_server(workspace, nats_server)?,
        folder: workspace.target.join("cgroup2"),
    };
    crate::build(workspace)?;
    node::build(workspace)?;
    node::build_sidecar(workspace)?;
    let tests = node::build_tests(workspace)?;
    let shares = shares(&tests, filters)?;
    fs::create_dir_all(&machine.folder).map_err(|err| format!("create {}: {err}", machine.folder.display()))?;
    machine.pack(workspace, &tests, &shares)?;

    let count: usize = shares.iter().map(|share| share.tests.len()).sum();
    eprintln!("==> run {count} tests of the shim on {} virtual machines with cgroup version 2", shares.len());
    let start = Instant::now();
    let (machine, qemu) = (&machine, &qemu);
    let failures: Vec<String> = thread::scope(|scope| {
        let runs: Vec<_> = shares.iter().map(|share| scope.spawn(move || machine.run(qemu, share))).collect();
        let results = runs.into_iter().map(|run| run.join().unwrap_or_else(|_| Err("a thread panicked".to_owned())));
        results.filter_map(Result::err).collect()
    });
    eprintln!("    took {:.1} s", start.elapsed().as_secs_f32());
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

/// The tests that one machine does.
struct Share {
    name: String,
    tests: Vec<String>,
    systemd: bool,
}

/// Shares out the tests with one of `filters` in their name, or all: one share for each core, and one of those that are
/// ignored elsewhere, since they need systemd.
fn shares(tests: &Path, filters: &[OsString]) -> Result<Vec<Share>> {
    let list = |args: &[&str]| -> Result<Vec<String>> {
        let names = step::output(
            Command::new(tests).args(["--list", "--format=terse", "--skip", node::KUBERNETES]).args(args).args(filters),
        )?;
        Ok(names.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    };
    let with_systemd = list(&["--ignored"])?;
    let mut others = list(&[])?;
    others.retain(|test| !with_systemd.contains(test));
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get()).min(others.len());
    let mut shares: Vec<_> = (0..cores)
        .map(|share| {
            let tests = others.iter().skip(share).step_by(cores).cloned().collect();
            Share { name: share.to_string(), tests, systemd: false }
        })
        .collect();
    if !with_systemd.is_empty() {
        shares.push(Share { name: "systemd".to_owned(), tests: with_systemd, systemd: true });
    }
    if shares.is_empty() { Err("no test of the shim has such a name".to_owned()) } else { Ok(shares) }
}

/// What all of the machines are made of.
struct Machine {
    /// The folder of the unpacked package.
    kernel: PathBuf,
    busybox: PathBuf,
    nats_server: PathBuf,
    /// Takes what is made for them.
    folder: PathBuf,
}

impl Machine {
    /// Writes the initramfs: the programs of this machine, what was built at the places where it is here, a script for
    /// each share of the tests.
    fn pack(&self, workspace: &Workspace, tests: &Path, shares: &[Share]) -> Result<()> {
        let mut archive = Initramfs::create(&self.initramfs())?;
        archive.file(Path::new("/init"), 0o755, INIT.as_bytes())?;
        archive.file(Path::new("/bin/busybox"), 0o755, &read(&self.busybox)?)?;
        let mut files = Files { archive };
        for folder in ["dev", "etc", "proc", "root", "run", "sys", "tmp", "var"] {
            files.archive.folder(&Path::new(MACHINE).join(folder))?;
        }
        files.text("/etc/hosts", 0o644, "127.0.0.1 localhost\n")?;
        files.text("/etc/resolv.conf", 0o644, "")?;
        files.text("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n")?;
        files.text("/etc/group", 0o644, "root:x:0:\n")?;
        files.copy(&self.busybox, Path::new("/bin/busybox"))?;
        for name in PROGRAMS {
            let program = tools::on_path(name).ok_or_else(|| format!("{name} is neither on PATH nor in /usr/sbin"))?;
            files.program(&program, &Path::new("/usr/bin").join(name))?;
        }
        for name in PLUGINS_USED {
            let plugin = Path::new(PLUGINS).join(name);
            files.program(&plugin, &plugin)?;
        }
        let modules = entries(&self.kernel.join("lib/modules"))?.pop().ok_or("the kernel's package has no modules")?;
        for (number, module) in MODULES.iter().enumerate() {
            // A shell lists them in the order of their names.
            files.copy(&modules.join(module), Path::new(&format!("/modules/{number}.ko")))?;
        }

        let mut script = "#!/bin/busybox sh\n".to_owned();
        let places = crate::places(workspace).into_iter().chain(node::places(workspace, &self.nats_server));
        for (variable, place) in places {
            _ = writeln!(script, "export {variable}={}", quoted(&place.to_string_lossy()));
            if place.is_dir() {
                files.folder(&place)?;
            } else {
                files.program(&self.stripped(workspace, &place)?, &place)?;
            }
        }
        for folder in ["tests/mails", "docs"] {
            files.folder(&workspace.root.join(folder))?;
        }
        files.program(&self.stripped(workspace, tests)?, Path::new("/usr/bin/shim-tests"))?;
        for Share { name, tests, .. } in shares {
            let script = format!("{script}exec shim-tests --include-ignored --exact {}\n", tests.join(" "));
            files.text(&format!("/share.{name}"), 0o755, &script)?;
        }
        files.text(FIRST, 0o755, FIRST_SCRIPT)?;
        files.text("/run-tests", 0o755, RUN_TESTS)?;
        if shares.iter().any(|share| share.systemd) {
            let systemd = tools::systemd()?;
            files.program(&systemd, &systemd)?;
            files.program(
                &tools::on_path("systemctl").ok_or("systemctl is not on PATH")?,
                Path::new("/usr/bin/systemctl"),
            )?;
            files.text("/etc/systemd/system/tests.service", 0o644, UNIT_FILE)?;
            // Without it systemd takes this for the first run of a new machine, which it would set up.
            files.text("/etc/machine-id", 0o444, "6d61696c726f6f6d6d61696c726f6f6d\n")?;
        }
        files.archive.finish()
    }

    /// A machine that does one share of the tests.
    fn command(&self, qemu: &Path, share: &Share) -> Result<Command> {
        let boot = self.kernel.join("boot");
        let kernel = entries(&boot)?.into_iter().find(|path| path.to_string_lossy().contains("/vmlinuz-"));
        let kernel = kernel.ok_or_else(|| format!("no kernel in {}", boot.display()))?;
        // In the foreground, so that Ctrl-C reaches both.
        let mut command = Command::new("timeout");
        command.args(["--foreground", "--kill-after=10", &TIME_LIMIT_SECONDS.to_string()]).arg(qemu);
        command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]);
        // Machine code is made for x86-64-v3. With `erms` or `fsrm` the kernel would copy by `rep movsb`, which is
        // emulated byte by byte.
        command.args(["-cpu", "max,-erms,-fsrm,-la57", "-m", &MEMORY_MIB.to_string()]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none", "-nic", "none", "-serial", "stdio"]);
        command.arg("-serial").arg(format!("file:{}", self.result(share).display()));
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(self.initramfs());
        // What makes an emulated kernel slow: clearing memory, defences, code that is somewhere else each time.
        let fast = "init_on_alloc=0 mitigations=off nokaslr norandmaps";
        let name = &share.name;
        let first =
            if share.systemd { format!("{} systemd.unit={UNIT}", tools::systemd()?.display()) } else { FIRST.into() };
        command.arg("-append").arg(format!("console=ttyS0 loglevel=3 panic=-1 {fast} share={name} first={first}"));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(command)
    }

    /// Runs one to its end and passes its console on, line by line.
    fn run(&self, qemu: &Path, share: &Share) -> Result<()> {
        let name = format!("machine {}", share.name);
        let result = self.result(share);
        fs::write(&result, "").map_err(|err| format!("write {}: {err}", result.display()))?;
        let mut qemu = self.command(qemu, share)?.spawn().map_err(|err| format!("start {name}: {err}"))?;
        let console = qemu.stdout.take().ok_or("a console was asked for")?;
        for line in BufReader::new(console).split(b'\n').map_while(std::io::Result::ok) {
            println!("{name}: {}", String::from_utf8_lossy(&line).trim_end());
        }
        let status = qemu.wait().map_err(|err| format!("wait for {name}: {err}"))?;
        match (status.code(), String::from_utf8_lossy(&read(&result)?).trim()) {
            (Some(0), "0") => Ok(()),
            (Some(0), "") => Err(format!("{name} broke down; its console says why")),
            (Some(0), _) => Err(format!("tests failed on {name}")),
            (Some(124), _) => Err(format!("{name} did not end within {TIME_LIMIT_SECONDS} s")),
            _ => Err(format!("QEMU ended with {status}")),
        }
    }

    /// An executable without its debugging information, which the machines would hold in memory.
    fn stripped(&self, workspace: &Workspace, program: &Path) -> Result<PathBuf> {
        let stripped = self.folder.join(program.file_name().unwrap_or_default());
        node::strip(workspace, "--strip-debug", program, &stripped)?;
        Ok(stripped)
    }

    fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs")
    }

    /// Takes the exit code of a share of the tests.
    fn result(&self, share: &Share) -> PathBuf {
        self.folder.join(format!("result.{}", share.name))
    }
}

/// The files of the machines' root.
struct Files {
    archive: Initramfs,
}

impl Files {
    fn text(&mut self, path: &str, mode: u32, content: &str) -> Result<()> {
        self.archive.file(&within(Path::new(path)), mode, content.as_bytes())
    }

    fn copy(&mut self, from: &Path, to: &Path) -> Result<()> {
        let metadata = fs::metadata(from).map_err(|err| format!("{}: {err}", from.display()))?;
        self.archive.file(&within(to), metadata.permissions().mode() & 0o777, &read(from)?)
    }

    /// Copies an executable with the libraries that it is linked to.
    fn program(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.copy(from, to)?;
        // For one that is linked statically this fails.
        let libraries = Command::new("ldd").arg(from).output().map_err(|err| format!("start ldd: {err}"))?;
        let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            self.copy(Path::new(library), Path::new(library))?;
        }
        Ok(())
    }

    /// Copies the files of a folder to where they are here.
    fn folder(&mut self, folder: &Path) -> Result<()> {
        for file in entries(folder)? {
            self.copy(&file, &file)?;
        }
        Ok(())
    }
}

/// Where the initramfs has what the machine's root will have at `path`.
fn within(path: &Path) -> PathBuf {
    Path::new(MACHINE).join(path.strip_prefix("/").unwrap_or(path))
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).map_err(|err| format!("read {}: {err}", file.display()))
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|err| format!("read {}: {err}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
