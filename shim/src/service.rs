//! The task service, version 2, that containerd speaks with the shim.

use crate::bundle::Bundle;
use crate::component::Components;
use crate::container::{Container, Other, Pod, Request, remove_remains};
use crate::options::Options;
use crate::process::{End, KILLED, Process};
use crate::reaper::{Child, Reaper};
use crate::stdio::Names;
use anyhow::Context as _;
use async_trait::async_trait;
use containerd_shim::api;
use containerd_shim::asynchronous::{ExitSignal, Shim, spawn, util::write_str_to_file};
use containerd_shim::event::Event;
use containerd_shim::protos::events::task as events;
use containerd_shim::protos::protobuf::{MessageDyn, MessageField};
use containerd_shim::protos::shim::oci::ProcessDetails;
use containerd_shim::protos::shim_async::Task;
use containerd_shim::protos::ttrpc::{self, Code, r#async::TtrpcContext, context};
use containerd_shim::protos::types::task::ProcessInfo;
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::{Config, Error, Flags, StartOpts, TtrpcResult, util::convert_to_any};
use rustix::process::Signal;
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{Mutex, mpsc};

/// Where containerd finds the socket of a bundle's shim after a restart of its own.
const ADDRESS: &str = "address";

/// One pod's shim.
#[derive(Clone)]
pub struct Service {
    id: String,
    namespace: String,
    /// The folder that containerd starts the shim in.
    bundle: PathBuf,
    exit: Arc<ExitSignal>,
    pod: Arc<Pod>,
    containers: Arc<Mutex<HashMap<String, Arc<Container>>>>,
    events: mpsc::UnboundedSender<(String, Box<dyn MessageDyn>)>,
}

fn refuse(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}

fn not_found(id: &str) -> ttrpc::Error {
    refuse(Code::NOT_FOUND, format!("{id}: not found"))
}

fn failed(err: impl Into<anyhow::Error>) -> ttrpc::Error {
    refuse(Code::UNKNOWN, format!("{:#}", err.into()))
}

impl Service {
    async fn container(&self, id: &str) -> TtrpcResult<Arc<Container>> {
        self.containers.lock().await.get(id).cloned().ok_or_else(|| not_found(id))
    }

    /// The container's first process, or the one that was executed in it under `exec_id`.
    async fn process(&self, id: &str, exec_id: &str) -> TtrpcResult<Arc<Process>> {
        let container = self.container(id).await?;
        if exec_id.is_empty() {
            return Ok(container.first.clone());
        }
        match container.other(exec_id) {
            Some(Other::Started(process)) => Ok(process),
            Some(Other::Added { .. }) => Err(refuse(Code::FAILED_PRECONDITION, format!("{exec_id}: was not started"))),
            None => Err(not_found(exec_id)),
        }
    }

    fn publish<E: Event + 'static>(&self, event: E) {
        // Without a publisher the shim is stopping.
        let _ = self.events.send((event.topic(), Box::new(event)));
    }

    /// Tells of the end of a container's first process, after its start.
    async fn await_first(self, container: Arc<Container>, child: Child) {
        let end = container.ended(child).await;
        let _started = container.started.lock().await;
        if container.ran_out_of_memory(end) {
            self.publish(events::TaskOOM { container_id: container.id.clone(), ..Default::default() });
        }
        self.tell_end(&container.id, &container.id, &container.first, end);
    }

    fn tell_end(&self, container: &str, id: &str, process: &Process, end: End) {
        self.publish(events::TaskExit {
            container_id: container.into(),
            id: id.into(),
            pid: process.number(),
            exit_status: end.code,
            exited_at: end.timestamp(),
            ..Default::default()
        });
        process.tell(end);
    }

    async fn start_other(&self, container: Arc<Container>, exec_id: String) -> TtrpcResult<u32> {
        if container.other(&exec_id).is_none() {
            return Err(not_found(&exec_id));
        }
        let (process, child) = container.start_other(&exec_id, &self.pod.reaper).await.map_err(failed)?;
        let pid = process.number();
        self.publish(events::TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: exec_id.clone(),
            pid,
            ..Default::default()
        });
        let service = self.clone();
        tokio::spawn(async move {
            let end = process.ended(child).await;
            service.tell_end(&container.id, &exec_id, &process, end);
        });
        Ok(pid)
    }
}

#[async_trait]
impl Shim for Service {
    type T = Self;

    async fn new(_runtime: &str, flags: &Flags, _config: &mut Config) -> Self {
        let current = std::env::current_dir().unwrap_or_default();
        let folder =
            std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf)).unwrap_or_default();
        let reaper = Reaper::default();
        let components = Components::new(folder.join("mailroom-compiler"), reaper.clone());
        Self {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            bundle: if flags.bundle.is_empty() { current } else { flags.bundle.clone().into() },
            exit: Arc::default(),
            pod: Arc::new(Pod { components, reaper, host: folder.join("mailroom-host") }),
            containers: Arc::default(),
            events: mpsc::unbounded_channel().0,
        }
    }

    /// Starts the pod's shim, or finds the one that its sandbox has started.
    async fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        let bundle = Bundle::open(&self.bundle).map_err(|err| Error::Other(format!("{err:#}")))?;
        let group = bundle.sandbox().unwrap_or(&opts.id).to_owned();
        let address = containerd_shim::socket_address(&opts.address, &opts.namespace, &group);
        if !is_answered(&address) {
            spawn(opts, &group, vec![]).await?;
        }
        write_str_to_file(self.bundle.join(ADDRESS), &address).await?;
        Ok(address)
    }

    /// containerd has this called when the shim of a container has gone, and when a container could not be made.
    async fn delete_shim(&mut self) -> Result<api::DeleteResponse, Error> {
        remove_remains(&self.id, &self.bundle).await;
        if let Ok(address) = std::fs::read_to_string(self.bundle.join(ADDRESS))
            && !is_answered(&address)
        {
            // A shim that was killed leaves its socket.
            let _ = std::fs::remove_file(socket(&address));
        }
        // With its shim the container was killed.
        let end = End::now(KILLED);
        Ok(api::DeleteResponse { exit_status: end.code, exited_at: end.timestamp(), ..Default::default() })
    }

    async fn wait(&mut self) {
        self.exit.wait().await;
    }

    async fn create_task_service(&self, publisher: RemotePublisher) -> Self {
        let (events, mut queue) = mpsc::unbounded_channel::<(String, Box<dyn MessageDyn>)>();
        let namespace = self.namespace.clone();
        // One after the other: their order means something.
        tokio::spawn(async move {
            while let Some((topic, event)) = queue.recv().await {
                if let Err(err) = publisher.publish(context::Context::default(), &topic, &namespace, event).await {
                    log::warn!("publish {topic}: {err}");
                }
            }
        });
        let reaper = self.pod.reaper.clone();
        tokio::spawn(async move {
            if let Err(err) = reaper.run().await {
                log::error!("reap orphans: {err}");
            }
        });
        let pod = self.pod.clone();
        // Asked while the sandbox is made, so that no component waits for the answer.
        tokio::spawn(async move { pod.components.engine().await.map(drop) });
        Self { events, ..self.clone() }
    }
}

#[async_trait]
impl Task for Service {
    async fn create(&self, _: &TtrpcContext, req: api::CreateTaskRequest) -> TtrpcResult<api::CreateTaskResponse> {
        if !req.checkpoint.is_empty() {
            return Err(refuse(Code::UNIMPLEMENTED, "containers are not restored from checkpoints"));
        }
        if self.containers.lock().await.contains_key(&req.id) {
            return Err(refuse(Code::ALREADY_EXISTS, format!("{}: is there already", req.id)));
        }
        let options = Options::from_any(req.options.as_ref()).map_err(failed)?;
        let bundle = PathBuf::from(&req.bundle);
        let sandbox = match Bundle::open(&bundle).map_err(failed)?.sandbox() {
            Some(id) => self.containers.lock().await.get(id).map(|sandbox| sandbox.cgroup.clone()),
            None => None,
        };
        let (stdin, stdout, stderr) = (req.stdin.clone(), req.stdout.clone(), req.stderr.clone());
        let names = Names { stdin, stdout, stderr, terminal: req.terminal };
        let request = Request { id: req.id.clone(), bundle, rootfs: req.rootfs.clone(), names, options, sandbox };
        let (container, child) = Container::create(&self.pod, request).await.map_err(failed)?;
        let (container, pid) = (Arc::new(container), child.pid);
        self.containers.lock().await.insert(req.id.clone(), container.clone());
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        self.publish(events::TaskCreate {
            container_id: req.id,
            bundle: req.bundle,
            rootfs: req.rootfs,
            pid,
            ..Default::default()
        });
        tokio::spawn(self.clone().await_first(container, child));
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, req: api::StartRequest) -> TtrpcResult<api::StartResponse> {
        let container = self.container(&req.id).await?;
        if !req.exec_id.is_empty() {
            let pid = self.start_other(container, req.exec_id).await?;
            return Ok(api::StartResponse { pid, ..Default::default() });
        }
        let mut started = container.started.lock().await;
        if *started {
            return Err(refuse(Code::FAILED_PRECONDITION, format!("{}: was started", req.id)));
        }
        container.start(&self.pod.reaper).await.map_err(failed)?;
        *started = true;
        let pid = container.first.number();
        self.publish(events::TaskStart { container_id: req.id, pid, ..Default::default() });
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, req: api::StateRequest) -> TtrpcResult<api::StateResponse> {
        let container = self.container(&req.id).await?;
        let mut state = api::StateResponse {
            id: req.id,
            exec_id: req.exec_id.clone(),
            bundle: container.bundle.display().to_string(),
            status: api::Status::CREATED.into(),
            ..Default::default()
        };
        let (process, names) = match container.other(&req.exec_id) {
            _ if req.exec_id.is_empty() => (Some(container.first.clone()), container.first.names.clone()),
            Some(Other::Started(process)) => (Some(process.clone()), process.names.clone()),
            Some(Other::Added { names, .. }) => (None, names),
            None => return Err(not_found(&req.exec_id)),
        };
        if let Some(process) = process {
            state.pid = process.number();
            // A lock that is held is a start under way.
            let started = !req.exec_id.is_empty() || container.started.try_lock().is_ok_and(|started| *started);
            if let Some(end) = process.end() {
                state.status = api::Status::STOPPED.into();
                state.exit_status = end.code;
                state.exited_at = end.timestamp();
            } else if container.is_paused() {
                state.status = api::Status::PAUSED.into();
            } else if started {
                state.status = api::Status::RUNNING.into();
            }
        }
        (state.stdin, state.stdout, state.stderr) = (names.stdin, names.stdout, names.stderr);
        state.terminal = names.terminal;
        Ok(state)
    }

    async fn wait(&self, _: &TtrpcContext, req: api::WaitRequest) -> TtrpcResult<api::WaitResponse> {
        let process = if req.exec_id.is_empty() {
            self.container(&req.id).await?.first.clone()
        } else {
            let started = self.container(&req.id).await?.until_started(&req.exec_id).await;
            started.ok_or_else(|| not_found(&req.exec_id))?
        };
        let end = process.wait().await;
        Ok(api::WaitResponse { exit_status: end.code, exited_at: end.timestamp(), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, req: api::KillRequest) -> TtrpcResult<api::Empty> {
        let sent = if req.exec_id.is_empty() {
            let container = self.container(&req.id).await?;
            container.first.end().is_none()
                && container.signal(req.signal, req.all, &self.pod.reaper).await.map_err(failed)?
        } else {
            let signal = i32::try_from(req.signal).ok().and_then(Signal::from_named_raw);
            let signal = signal.ok_or_else(|| refuse(Code::INVALID_ARGUMENT, format!("no signal {}", req.signal)))?;
            self.process(&req.id, &req.exec_id).await?.signal(signal).map_err(failed)?
        };
        if sent { Ok(api::Empty::new()) } else { Err(refuse(Code::NOT_FOUND, "process already finished")) }
    }

    async fn delete(&self, _: &TtrpcContext, req: api::DeleteRequest) -> TtrpcResult<api::DeleteResponse> {
        let container = self.container(&req.id).await?;
        if !req.exec_id.is_empty() {
            let (end, pid) = match container.other(&req.exec_id) {
                None => return Err(not_found(&req.exec_id)),
                Some(Other::Added { .. }) => (End::now(0), 0),
                Some(Other::Started(process)) => match process.end() {
                    Some(end) => (end, process.number()),
                    None => return Err(refuse(Code::FAILED_PRECONDITION, format!("{}: still runs", req.exec_id))),
                },
            };
            container.forget(&req.exec_id);
            let (exit_status, exited_at) = (end.code, end.timestamp());
            return Ok(api::DeleteResponse { pid, exit_status, exited_at, ..Default::default() });
        }
        if container.first.end().is_none() && *container.started.lock().await {
            return Err(refuse(Code::FAILED_PRECONDITION, format!("{}: still runs", req.id)));
        }
        // This ends one that was never started.
        container.delete(&self.pod.reaper).await.map_err(failed)?;
        let end = container.first.wait().await;
        self.containers.lock().await.remove(&req.id);
        let (pid, exit_status, exited_at) = (container.first.number(), end.code, end.timestamp());
        self.publish(events::TaskDelete {
            container_id: req.id,
            pid,
            exit_status,
            exited_at: exited_at.clone(),
            ..Default::default()
        });
        Ok(api::DeleteResponse { pid, exit_status, exited_at, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, req: api::ExecProcessRequest) -> TtrpcResult<api::Empty> {
        let container = self.container(&req.id).await?;
        if container.has_component {
            let message = "exec is not for a WebAssembly container: there is nothing in it to execute; see its log and \
                           metrics, or add a sidecar";
            return Err(refuse(Code::UNIMPLEMENTED, message));
        }
        let description = req.spec.into_option().map(|spec| spec.value).context("no process is described");
        let description = description.map_err(|err| refuse(Code::INVALID_ARGUMENT, err.to_string()))?;
        let names = Names { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal };
        container.add(&req.exec_id, description, names).map_err(|err| refuse(Code::ALREADY_EXISTS, err.to_string()))?;
        self.publish(events::TaskExecAdded { container_id: req.id, exec_id: req.exec_id, ..Default::default() });
        Ok(api::Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: api::ResizePtyRequest) -> TtrpcResult<api::Empty> {
        let size = |length: u32| u16::try_from(length).unwrap_or(u16::MAX);
        let process = self.process(&req.id, &req.exec_id).await?;
        process.streams().resize(size(req.width), size(req.height)).map_err(failed)?;
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: api::CloseIORequest) -> TtrpcResult<api::Empty> {
        if req.stdin {
            self.process(&req.id, &req.exec_id).await?.streams().close_stdin();
        }
        Ok(api::Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, req: api::PauseRequest) -> TtrpcResult<api::Empty> {
        self.container(&req.id).await?.set_paused(true, &self.pod.reaper).await.map_err(failed)?;
        self.publish(events::TaskPaused { container_id: req.id, ..Default::default() });
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: api::ResumeRequest) -> TtrpcResult<api::Empty> {
        self.container(&req.id).await?.set_paused(false, &self.pod.reaper).await.map_err(failed)?;
        self.publish(events::TaskResumed { container_id: req.id, ..Default::default() });
        Ok(api::Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> TtrpcResult<api::Empty> {
        Err(refuse(Code::UNIMPLEMENTED, "containers are not checkpointed: their messages are in JetStream"))
    }

    async fn pids(&self, _: &TtrpcContext, req: api::PidsRequest) -> TtrpcResult<api::PidsResponse> {
        let container = self.container(&req.id).await?;
        let executed: HashMap<_, _> = container.others().into_iter().map(|(id, pid)| (pid, id)).collect();
        let mut processes = Vec::new();
        for pid in container.cgroup.processes() {
            let mut process = ProcessInfo { pid: pid.as_raw_nonzero().get().unsigned_abs(), ..Default::default() };
            if let Some(exec_id) = executed.get(&pid) {
                let details = ProcessDetails { exec_id: exec_id.clone(), ..Default::default() };
                process.info = MessageField::some(convert_to_any(Box::new(details)).map_err(failed)?);
            }
            processes.push(process);
        }
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, req: api::StatsRequest) -> TtrpcResult<api::StatsResponse> {
        let stats = self.container(&req.id).await?.cgroup.metrics().map_err(failed)?;
        Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn update(&self, _: &TtrpcContext, req: api::UpdateTaskRequest) -> TtrpcResult<api::Empty> {
        let resources = req.resources.into_option();
        let resources = resources.ok_or_else(|| refuse(Code::INVALID_ARGUMENT, "no resources are given"))?;
        self.container(&req.id).await?.update(&resources.value, &self.pod.reaper).await.map_err(failed)?;
        Ok(api::Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, req: api::ConnectRequest) -> TtrpcResult<api::ConnectResponse> {
        let task_pid = self.container(&req.id).await.map_or(0, |container| container.first.number());
        let version = env!("CARGO_PKG_VERSION").into();
        Ok(api::ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> TtrpcResult<api::Empty> {
        if self.containers.lock().await.is_empty() {
            self.exit.signal();
        }
        Ok(api::Empty::new())
    }
}

/// The path of a socket's address.
fn socket(address: &str) -> &str {
    address.trim().trim_start_matches("unix://")
}

/// Whether a shim listens there.
fn is_answered(address: &str) -> bool {
    UnixStream::connect(socket(address)).is_ok()
}
