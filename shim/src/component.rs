//! Components as machine code: compiled once a node by a confined helper, and kept where only root may write.

use crate::cgroup::Cgroup;
use crate::reaper::Reaper;
use anyhow::{Context as _, Result, bail, ensure};
use compiled_cache::{Cache, Readers};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tempfile::NamedTempFile;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

/// Longest time that one component may take to compile. Those of Python take 17 s on a slow core.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(180);

/// How long a pod waits for another one that compiles the same component, before it does so itself: the other's
/// processor time may be scarce.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(5);
const OTHERS_INTERVAL: Duration = Duration::from_millis(10);

/// The most machine code that is taken from the compiler, in bytes.
const MACHINE_CODE_BYTES_MAX: u64 = 512 << 20;

/// The most that is passed on of what the compiler says, in bytes.
const MESSAGE_BYTES_MAX: u64 = 4 << 10;

/// Finds machine code for components, or has it made.
pub struct Components {
    compiler: PathBuf,
    engine: OnceCell<String>,
    reaper: Reaper,
}

impl Components {
    /// With the compiler at this path.
    pub fn new(compiler: PathBuf, reaper: Reaper) -> Self {
        Self { compiler, engine: OnceCell::new(), reaper }
    }

    /// Names what machine code depends on besides its component; asks the compiler, once.
    ///
    /// # Errors
    /// The compiler cannot be run.
    pub async fn engine(&self) -> Result<&str> {
        let ask = async || {
            let _command = self.reaper.command();
            let compiler = self.compiler.display();
            let output = Command::new(&self.compiler).arg("--engine").env_clear().stdin(Stdio::null()).output().await;
            let output = output.with_context(|| format!("run {compiler}; it belongs beside the shim"))?;
            let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            let plain = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
            ensure!(output.status.success() && plain, "{compiler} does not say its engine, but {id:?}");
            anyhow::Ok(id)
        };
        self.engine.get_or_try_init(ask).await.map(String::as_str)
    }

    /// The path of the machine code of the component at `path` in `rootfs`.
    ///
    /// It is taken from `cache`, of at most `cache_max_bytes`, or compiled in a cgroup below `cgroup` and put there.
    ///
    /// # Errors
    /// No such component; one that does not compile; a cache that others than root may write to.
    pub async fn machine_code(
        &self,
        rootfs: &Path,
        path: &Path,
        cache: &Path,
        cache_max_bytes: u64,
        cgroup: &Cgroup,
    ) -> Result<PathBuf> {
        let component = open_inside(rootfs, path)?;
        let hashed = component.try_clone().context("read the component")?;
        let digest = spawn_blocking(move || hash(hashed)).await?.with_context(|| format!("read {}", path.display()))?;
        let digest = hex(&digest);
        let cache = Cache::open(cache, self.engine().await?, cache_max_bytes, Readers::Everyone)?;
        if let Some(file) = cache.find(&digest) {
            return Ok(file);
        }
        let mut lock = cache.lock(&digest)?;
        let others = async {
            while !lock.try_acquire() && cache.find(&digest).is_none() {
                sleep(OTHERS_INTERVAL).await;
            }
        };
        // At worst it is compiled twice.
        let _ = timeout(OTHERS_TIMEOUT, others).await;
        if let Some(file) = cache.find(&digest) {
            return Ok(file);
        }
        let compiled = self.compile(component, &digest, &cache, cgroup).await;
        let compiled = compiled.with_context(|| format!("compile {}", path.display()))?;
        spawn_blocking(move || cache.keep(compiled, &digest)).await?
    }

    async fn compile(
        &self,
        mut component: File,
        digest: &str,
        cache: &Cache,
        cgroup: &Cgroup,
    ) -> Result<NamedTempFile> {
        let place = cgroup.make(&format!("mailroom-compiler-{}", std::process::id()))?;
        let empty = tempfile::tempdir().context("make an empty folder")?;
        component.seek(SeekFrom::Start(0)).context("read it")?;
        let command = self.reaper.command();
        let mut compiler = Command::new(&self.compiler);
        compiler.args(place.cgroup().folders()).env_clear().current_dir(&empty).kill_on_drop(true);
        compiler.stdin(component).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut compiler = compiler.spawn().with_context(|| format!("run {}", self.compiler.display()))?;
        let (output, errors) = (compiler.stdout.take(), compiler.stderr.take());
        let (mut output, mut errors) = (output.context("its output")?, errors.context("its errors")?);

        let mut stored = cache.begin()?;
        let mut writer = tokio::fs::File::from_std(stored.as_file().try_clone().context("write to the cache")?);
        let mut message = String::new();
        let run = async {
            let mut output = (&mut output).take(MACHINE_CODE_BYTES_MAX);
            let mut errors = (&mut errors).take(MESSAGE_BYTES_MAX);
            let (copied, read) =
                tokio::join!(tokio::io::copy(&mut output, &mut writer), errors.read_to_string(&mut message));
            copied.and(read.map(|_| 0)).context("read what it says")?;
            writer.sync_all().await.context("write to the cache")?;
            compiler.wait().await.context("await the compiler")
        };
        let status = timeout(COMPILE_TIMEOUT, run).await;
        drop(command);
        let status = match status {
            Ok(status) => status?,
            Err(_) => bail!(
                "not done within {COMPILE_TIMEOUT:?}; give the pod more processor time, or the node the compiled component"
            ),
        };
        match status.code() {
            Some(0) => {}
            Some(_) => bail!("{}", message.trim()),
            None => bail!(
                "the compiler was killed, most likely for want of memory: it counts to the pod's, so raise the pod's \
                 memory limit"
            ),
        }
        // The compiler met a stranger's bytes. Whatever it says, this is kept as the code of these bytes alone.
        let mut end = [0; 32];
        let stored_file = stored.as_file_mut();
        stored_file.seek(SeekFrom::End(-32)).and_then(|_| stored_file.read_exact(&mut end)).context("read its end")?;
        ensure!(hex(&end) == digest, "the compiler made code of another component");
        Ok(stored)
    }
}

/// Opens a file of a container that is not running yet. No link leads out of its root file system.
///
/// # Errors
/// There is none, or it is no ordinary file.
pub fn open_inside(rootfs: &Path, path: &Path) -> Result<File> {
    let name = path.display();
    let root = rustix::fs::open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open {}", rootfs.display()))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let file = File::from(opened.with_context(|| {
        format!("{name}: no such component in the image; its entrypoint names one that the image itself holds")
    })?);
    let is_file = file.metadata().with_context(|| format!("read {name}"))?.is_file();
    ensure!(is_file, "{name}: is no file, so no component");
    Ok(file)
}

fn hash(mut file: File) -> io::Result<Vec<u8>> {
    let mut hasher = Sha256::new();
    io::copy(&mut file, &mut hasher)?;
    Ok(hasher.finalize().to_vec())
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn no_link_leads_out_of_the_image() {
        let folder = tempfile::tempdir().expect("a folder");
        let rootfs = folder.path().join("rootfs");
        fs::create_dir_all(rootfs.join("app")).expect("folders");
        fs::write(rootfs.join("triage.wasm"), "inside").expect("write");
        fs::write(folder.path().join("outside.wasm"), "outside").expect("write");
        symlink("/triage.wasm", rootfs.join("app/absolute.wasm")).expect("a link");
        symlink("../../../../outside.wasm", rootfs.join("app/up.wasm")).expect("a link");
        symlink(folder.path().join("outside.wasm"), rootfs.join("out.wasm")).expect("a link");
        let read = |path: &str| open_inside(&rootfs, Path::new(path)).and_then(|file| Ok(io::read_to_string(file)?));
        assert_eq!(read("/triage.wasm").expect("a file"), "inside");
        assert_eq!(read("/app/absolute.wasm").expect("a file"), "inside");
        for (path, named) in [
            ("/app/up.wasm", "no such component in the image"),
            ("/out.wasm", "no such component in the image"),
            ("/none.wasm", "no such component in the image"),
            ("/app", "is no file"),
        ] {
            let error = format!("{:#}", read(path).expect_err(path));
            assert!(error.starts_with(path) && error.contains(named), "{error}");
        }
    }
}
