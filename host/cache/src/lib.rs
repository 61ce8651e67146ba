//! Machine code of components on disk: made once, and trusted, since nobody else can have put it there.
//!
//! The folder and every file belong to the user who runs the code, and nobody else may write to them. A file is named
//! after the SHA-256 of its component and lies in a folder named after all else that machine code depends on.

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{AtFlags, CWD, FlockOperation, Timespec, Timestamps, UTIME_NOW, flock, utimensat};
use rustix::process::geteuid;
use std::fs::{self, File, Metadata, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tempfile::NamedTempFile;

/// A cache of machine code for one engine.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    of_engine: PathBuf,
    max_bytes: u64,
}

/// Who may read what is in a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Its owner alone.
    Owner,
    /// Everyone: the processes of pods run as other users.
    Everyone,
}

impl Cache {
    /// Opens the cache in `folder`, which is made if it is not there, for an engine with that id. All its engines
    /// together hold at most `max_bytes`.
    ///
    /// # Errors
    /// A folder that cannot be made, that is another user's, or that others may write to.
    pub fn open(folder: &Path, engine: &str, max_bytes: u64, readers: Readers) -> Result<Self> {
        let folder = own_folder(folder, readers)?;
        let of_engine = own_folder(&folder.join(engine), readers)?;
        Ok(Self { folder, of_engine, max_bytes })
    }

    /// The machine code of the component with this SHA-256, in hexadecimal, if it is there and nobody else can have
    /// written it. It counts as used now.
    pub fn find(&self, digest: &str) -> Option<PathBuf> {
        let file = self.file(digest);
        let metadata = fs::symlink_metadata(&file).ok()?;
        if !metadata.is_file() || !is_own(&metadata) {
            return None;
        }
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let used = Timestamps { last_access: now, last_modification: now };
        // On a file system that is read-only by now the code is as good.
        let _ = utimensat(CWD, &file, &used, AtFlags::SYMLINK_NOFOLLOW);
        Some(file)
    }

    /// An empty file for machine code; it is gone when dropped, unless [`keep`](Self::keep) gets it.
    ///
    /// # Errors
    /// The cache cannot be written to.
    pub fn begin(&self) -> Result<NamedTempFile> {
        NamedTempFile::new_in(&self.of_engine).context("write to the cache of compiled components")
    }

    /// Keeps what was written to `file` as the machine code of the component with this SHA-256, in hexadecimal. What
    /// was not used for longest goes, where it takes too much room then; those who have mapped it keep it.
    ///
    /// # Errors
    /// The cache cannot be written to.
    pub fn keep(&self, file: NamedTempFile, digest: &str) -> Result<PathBuf> {
        let kept = self.file(digest);
        let write = || {
            file.as_file().sync_all()?;
            fs::set_permissions(file.path(), Permissions::from_mode(0o444))?;
            Ok(file.persist(&kept)?)
        };
        write().map_err(|err: std::io::Error| err).context("write to the cache of compiled components")?;
        self.evict(&kept);
        Ok(kept)
    }

    /// Forgets a file of [`find`](Self::find) that turned out to be unusable.
    pub fn forget(&self, digest: &str) {
        let _ = fs::remove_file(self.file(digest));
    }

    /// The lock for making machine code of the component with this SHA-256, which nobody has yet.
    ///
    /// # Errors
    /// The cache cannot be written to.
    pub fn lock(&self, digest: &str) -> Result<Lock> {
        let path = self.of_engine.join(format!("{digest}.lock"));
        let file = File::create(&path).context("write to the cache of compiled components")?;
        Ok(Lock { file, path, is_mine: false })
    }

    fn file(&self, digest: &str) -> PathBuf {
        self.of_engine.join(format!("{digest}.cwasm"))
    }

    fn evict(&self, kept: &Path) {
        let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for path in entries(&self.folder).flat_map(|engine| entries(&engine).collect::<Vec<_>>()) {
            if let Ok(metadata) = fs::metadata(&path) {
                files.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len(), path));
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if total <= self.max_bytes {
                return;
            }
            if path != kept && fs::remove_file(&path).is_ok() {
                total -= bytes;
            }
        }
    }
}

/// Keeps others from making the same machine code meanwhile, if they care. When dropped it is given back, and nothing
/// of it stays in the cache.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
    is_mine: bool,
}

impl Lock {
    /// Whether the caller has the lock now.
    pub fn try_acquire(&mut self) -> bool {
        self.is_mine = self.is_mine || flock(&self.file, FlockOperation::NonBlockingLockExclusive).is_ok();
        self.is_mine
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.is_mine {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes a folder that only this user writes to, or checks that it is one.
fn own_folder(path: &Path, readers: Readers) -> Result<PathBuf> {
    let name = path.display();
    let mode = match readers {
        Readers::Owner => 0o700,
        Readers::Everyone => 0o755,
    };
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).with_context(|| format!("make {name}"))?;
    let metadata = fs::symlink_metadata(path).with_context(|| format!("read {name}"))?;
    ensure!(
        metadata.is_dir() && is_own(&metadata),
        "{name}: others may write there, so what lies in it is not run; `chmod go-w` it, or name another cache"
    );
    Ok(path.to_path_buf())
}

fn is_own(metadata: &Metadata) -> bool {
    metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::time::Duration;

    const ROOM: u64 = 1 << 20;

    fn cache(folder: &Path, max_bytes: u64) -> Cache {
        Cache::open(&folder.join("cache"), "1", max_bytes, Readers::Owner).expect("a cache")
    }

    fn keep(cache: &Cache, digest: &str) -> PathBuf {
        let mut file = cache.begin().expect("a file");
        file.write_all(&[0; 10]).expect("write");
        cache.keep(file, digest).expect("kept")
    }

    #[test]
    fn what_is_kept_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path(), ROOM);
        assert_eq!(cache.find("a"), None);
        let kept = keep(&cache, "a");
        assert_eq!(cache.find("a"), Some(kept));
        let other = Cache::open(&folder.path().join("cache"), "2", ROOM, Readers::Owner).expect("a cache");
        assert_eq!(other.find("a"), None);
        cache.forget("a");
        assert_eq!(cache.find("a"), None);
    }

    #[test]
    fn what_others_can_write_is_not_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path(), ROOM);
        let kept = keep(&cache, "a");
        fs::set_permissions(&kept, Permissions::from_mode(0o666)).expect("set permissions");
        assert_eq!(cache.find("a"), None);
        let elsewhere = folder.path().join("elsewhere");
        fs::rename(&kept, &elsewhere).expect("rename");
        std::os::unix::fs::symlink(&elsewhere, &kept).expect("a link");
        assert_eq!(cache.find("a"), None);
    }

    #[test]
    fn what_was_used_last_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let names = ["a", "b", "c", "d"];
        let roomy = cache(folder.path(), ROOM);
        for (age, name) in (1..).zip(names) {
            let kept = keep(&roomy, name);
            let time = SystemTime::now() - Duration::from_secs(100 * age);
            File::open(kept).and_then(|file| file.set_modified(time)).expect("set the time");
        }
        assert!(roomy.find("d").is_some());
        let tight = cache(folder.path(), 35);
        keep(&tight, "e");
        assert_eq!(names.map(|name| tight.find(name).is_some()), [true, false, false, true]);
        assert!(tight.find("e").is_some());
    }

    #[test]
    fn one_has_the_lock() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path(), ROOM);
        let (mut mine, mut yours) = (cache.lock("a").expect("a lock"), cache.lock("a").expect("a lock"));
        assert!(mine.try_acquire() && !yours.try_acquire());
        drop(mine);
        assert!(yours.try_acquire());
        drop(yours);
        assert_eq!(fs::read_dir(&cache.of_engine).expect("a folder").count(), 0);
    }

    #[test]
    fn a_folder_that_others_write_to_is_no_cache() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).expect("set permissions");
        let error = Cache::open(folder.path(), "1", ROOM, Readers::Everyone).expect_err("refused");
        assert!(error.to_string().contains("others may write there"), "{error}");
    }
}
