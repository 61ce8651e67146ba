//! One container: made by runc in its bundle, and what can be done with it.

use crate::bundle::{Bundle, Workload};
use crate::cgroup::Cgroup;
use crate::component::{Components, open_inside};
use crate::options::Options;
use crate::process::{End, KILLED, Process};
use crate::reaper::{Child, Command, Reaper};
use crate::runc::Runc;
use crate::stdio::{Console, Names};
use anyhow::{Context as _, Result, bail};
use containerd_shim::asynchronous::util::{mkdir, mount_rootfs};
use containerd_shim::protos::types::mount::Mount;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Mutex as AsyncMutex, Notify};

/// What containers of a pod share.
pub struct Pod {
    pub components: Components,
    pub reaper: Reaper,
    /// The executable that runs components.
    pub host: PathBuf,
}

/// What is to be made.
pub struct Request {
    pub id: String,
    pub bundle: PathBuf,
    pub rootfs: Vec<Mount>,
    pub names: Names,
    pub options: Options,
    /// The cgroup of the pod's sandbox, if there is one.
    pub sandbox: Option<Cgroup>,
}

/// A container, from its making to its removal.
pub struct Container {
    pub id: String,
    pub bundle: PathBuf,
    pub cgroup: Cgroup,
    /// Whether the host runs it.
    pub has_component: bool,
    pub first: Arc<Process>,
    /// Whether it was started. Held while it is, so that its end is told after its start.
    pub started: AsyncMutex<bool>,
    has_own_processes: bool,
    /// The pod's kills for want of memory before this container could have any.
    oom_kills_before: u64,
    /// Whether somebody had it killed.
    killed: AtomicBool,
    paused: AtomicBool,
    others: Mutex<HashMap<String, Other>>,
    /// Tells that one of them was started or forgotten.
    others_changed: Notify,
    runc: Runc,
}

/// A process that is executed in the container beside its first.
#[derive(Clone)]
pub enum Other {
    /// It was described.
    Added { description: Vec<u8>, names: Names },
    /// It was started.
    Started(Arc<Process>),
}

impl Container {
    /// Makes a container up to the point where [`Container::start`] lets its first process begin.
    ///
    /// # Errors
    /// Whatever keeps it from being made; nothing of it is left then.
    pub async fn create(pod: &Pod, request: Request) -> Result<(Self, Child)> {
        let (bundle, id) = (request.bundle.clone(), request.id.clone());
        let runc = Runc::new(&request.options, &id, &bundle, "");
        let created = Self::make(pod, request).await;
        if created.is_err() {
            let _command = pod.reaper.command();
            if let Err(err) = runc.delete().await {
                log::warn!("remove what is left of container {id}: {err:#}");
            }
            unmount_rootfs(&bundle);
        }
        created
    }

    async fn make(pod: &Pod, request: Request) -> Result<(Self, Child)> {
        let Request { id, bundle: path, rootfs, names, options, sandbox } = request;
        options.keep(&path)?;
        let mut bundle = Bundle::open(&path)?;
        mkdir(bundle.rootfs(), 0o711).await.context("make the root file system's folder")?;
        for mount in &rootfs {
            mount_rootfs(mount, bundle.rootfs()).await.context("mount the root file system")?;
        }
        let (workload, rootfs) = (bundle.workload(), bundle.rootfs());
        match &workload {
            Workload::Native => {}
            Workload::Component(component) => {
                let parent = sandbox.unwrap_or_else(|| Cgroup::at(bundle.cgroups_path())).parent();
                let (cache, max) = (&options.cache, options.cache_max_bytes);
                let made = pod.components.machine_code(&rootfs, component, cache, max, &parent);
                let machine_code = made.await?;
                bundle.run_with(&pod.host, Some(&machine_code))?;
            }
            Workload::Compiled(component) if options.allow_compiled => {
                open_inside(&rootfs, component)?;
                bundle.run_with(&pod.host, None)?;
            }
            Workload::Compiled(component) => bail!(
                "{}: is machine code, which this node does not take from images; use the .wasm as the entrypoint, or \
                 set AllowCompiled in the runtime's options",
                component.display()
            ),
        }
        let runc = Runc::new(&options, &id, &path, bundle.cgroups_path());
        let command = pod.reaper.command();
        let console = names.terminal.then(Console::open).transpose()?;
        let (ends, mut streams) = names.open()?;
        let pid = runc.create(ends, console.as_ref().map(Console::path).as_deref()).await?;
        let child = pod.reaper.watch(pid, &command).context("watch the container's process")?;
        if let Some(console) = console {
            streams.attach(&names, console).await?;
        }
        // Of a process that has ended it can no longer be found out.
        let cgroup = Cgroup::of(pid)?;
        let container = Self {
            id,
            bundle: path,
            oom_kills_before: cgroup.parent().oom_kills().unwrap_or_default(),
            cgroup,
            has_component: workload != Workload::Native,
            first: Arc::new(Process::new(&child, names, streams)),
            started: AsyncMutex::new(false),
            has_own_processes: bundle.has_own_processes(),
            killed: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            others: Mutex::default(),
            others_changed: Notify::new(),
            runc,
        };
        Ok((container, child))
    }

    /// Lets the first process begin.
    ///
    /// # Errors
    /// What the OCI runtime says.
    pub async fn start(&self, reaper: &Reaper) -> Result<()> {
        let _command = reaper.command();
        self.runc.start().await
    }

    /// Awaits the first process, and ends what it leaves behind.
    pub async fn ended(&self, child: Child) -> End {
        let end = self.first.ended(child).await;
        if !self.has_own_processes {
            self.cgroup.kill();
        }
        end
    }

    /// Whether the kernel has killed a process of the container for want of memory, once its first has come to `end`.
    pub fn ran_out_of_memory(&self, end: End) -> bool {
        match self.cgroup.oom_kills() {
            Some(kills) => kills > 0,
            // systemd removes a scope as soon as its last process has ended. The pod's slice still has its kills, among
            // those of the others; this process was killed, and nobody had asked for that.
            None => {
                let kills = self.cgroup.parent().oom_kills().unwrap_or_default();
                end.code == KILLED && !self.killed.load(Ordering::Relaxed) && kills > self.oom_kills_before
            }
        }
    }

    /// Describes another process, in JSON as the specification has it.
    ///
    /// # Errors
    /// There is one of that name.
    pub fn add(&self, exec_id: &str, description: Vec<u8>, names: Names) -> Result<()> {
        self.with_others(|others| {
            if others.contains_key(exec_id) {
                bail!("{exec_id} is there already");
            }
            others.insert(exec_id.into(), Other::Added { description, names });
            Ok(())
        })
    }

    /// Starts another process.
    ///
    /// # Errors
    /// It was not described, or was started; or what the OCI runtime says.
    pub async fn start_other(&self, exec_id: &str, reaper: &Reaper) -> Result<(Arc<Process>, Child)> {
        let Some(Other::Added { description, names }) = self.other(exec_id) else { bail!("{exec_id} was started") };
        let command = reaper.command();
        let console = names.terminal.then(Console::open).transpose()?;
        let (ends, mut streams) = names.open()?;
        let socket = console.as_ref().map(Console::path);
        let pid = self.runc.exec(exec_id, &description, ends, socket.as_deref()).await?;
        let child = reaper.watch(pid, &command).context("watch the process")?;
        if let Some(console) = console {
            streams.attach(&names, console).await?;
        }
        let process = Arc::new(Process::new(&child, names, streams));
        self.with_others(|others| others.insert(exec_id.into(), Other::Started(process.clone())));
        self.others_changed.notify_waiters();
        Ok((process, child))
    }

    /// Another process.
    pub fn other(&self, exec_id: &str) -> Option<Other> {
        self.with_others(|others| others.get(exec_id).cloned())
    }

    /// Forgets another process.
    pub fn forget(&self, exec_id: &str) {
        self.with_others(|others| others.remove(exec_id));
        self.others_changed.notify_waiters();
    }

    /// Another process, once it is started; `None` when it is forgotten before. containerd awaits the end of a process
    /// before it has it started.
    pub async fn until_started(&self, exec_id: &str) -> Option<Arc<Process>> {
        loop {
            // Made before the look, so that no change between the two is missed.
            let changed = self.others_changed.notified();
            match self.other(exec_id)? {
                Other::Started(process) => return Some(process),
                Other::Added { .. } => changed.await,
            }
        }
    }

    /// The other processes that were started, with their numbers.
    pub fn others(&self) -> Vec<(String, Pid)> {
        let started = |(id, other): (&String, &Other)| match other {
            Other::Started(process) => Some((id.clone(), process.pid)),
            Other::Added { .. } => None,
        };
        self.with_others(|others| others.iter().filter_map(started).collect())
    }

    fn with_others<T>(&self, act: impl FnOnce(&mut HashMap<String, Other>) -> T) -> T {
        act(&mut self.others.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a signal to the first process, or to all. False if it has ended.
    ///
    /// # Errors
    /// The signal cannot be sent.
    pub async fn signal(&self, number: u32, all: bool, reaper: &Reaper) -> Result<bool> {
        let named = i32::try_from(number).ok().and_then(Signal::from_named_raw);
        if named == Some(Signal::KILL) {
            self.killed.store(true, Ordering::Relaxed);
        }
        match named {
            Some(signal) if all => {
                for pid in self.cgroup.processes() {
                    // It may be gone already.
                    let _ = kill_process(pid, signal);
                }
                Ok(true)
            }
            Some(signal) => self.first.signal(signal),
            // Real-time signals have no names; init systems take them.
            None => {
                let _command = reaper.command();
                self.runc.kill(number).await.map(|()| true)
            }
        }
    }

    /// Stops all processes where they are, or lets them go on.
    ///
    /// # Errors
    /// What the OCI runtime says.
    pub async fn set_paused(&self, paused: bool, reaper: &Reaper) -> Result<()> {
        let _command = reaper.command();
        if paused {
            self.runc.pause().await?
        } else {
            self.runc.resume().await?
        }
        self.paused.store(paused, Ordering::Relaxed);
        Ok(())
    }

    /// Whether its processes are stopped.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Sets the limits of its cgroup, given as JSON.
    ///
    /// # Errors
    /// What the OCI runtime says.
    pub async fn update(&self, resources: &[u8], reaper: &Reaper) -> Result<()> {
        let _command = reaper.command();
        self.runc.update(resources).await
    }

    /// Removes it; its processes are ended.
    ///
    /// # Errors
    /// What the OCI runtime says.
    pub async fn delete(&self, reaper: &Reaper) -> Result<()> {
        let _command: Command = reaper.command();
        self.runc.delete().await?;
        unmount_rootfs(&self.bundle);
        Ok(())
    }
}

/// Removes what is left in `bundle` of a container whose shim has gone.
pub async fn remove_remains(id: &str, bundle: &Path) {
    let runc = Runc::new(&Options::kept(bundle), id, bundle, "");
    if let Err(err) = runc.delete().await {
        eprintln!("remove container {id}: {err:#}");
    }
    unmount_rootfs(bundle);
}

/// Unmounts a root file system, all of its layers of mounts; processes that still use it keep it.
fn unmount_rootfs(bundle: &Path) {
    while unmount(bundle.join("rootfs"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}
