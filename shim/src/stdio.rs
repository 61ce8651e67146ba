//! Standard streams: the FIFOs that containerd reads and writes, and the ends that a process gets of them.
//!
//! The shim holds each FIFO open itself. So a process is not stopped when containerd goes away, and what it wrote last
//! waits for a containerd that comes back, even when the process is gone.

use anyhow::{Context as _, Result, bail};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::ioctl_fionread;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::copy;
use tokio::net::UnixListener;
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};
use tokio::process::Command;
use tokio::time::{interval, timeout};

/// How often it is looked whether containerd has read all.
const DRAIN_INTERVAL: Duration = Duration::from_millis(20);

/// The OCI runtime sends a terminal within this time.
const TERMINAL_TIMEOUT: Duration = Duration::from_secs(10);

/// The streams of a process, as containerd names them: the path of a FIFO, `file://` and a path, or nothing.
#[derive(Debug, Clone, Default)]
pub struct Names {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    /// Whether the process gets a terminal instead.
    pub terminal: bool,
}

/// The ends for the process.
#[derive(Debug)]
pub struct Ends {
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
}

/// What the shim holds of the streams.
#[derive(Debug, Default)]
pub struct Streams {
    stdin: Option<OwnedFd>,
    outputs: Vec<OwnedFd>,
    terminal: Option<OwnedFd>,
}

impl Names {
    /// Opens them without waiting for anybody at the other end.
    ///
    /// # Errors
    /// A FIFO or file that cannot be opened; a kind that is none of ours.
    pub fn open(&self) -> Result<(Ends, Streams)> {
        let mut streams = Streams::default();
        if self.terminal {
            return Ok((Ends { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() }, streams));
        }
        let stdin = if self.stdin.is_empty() {
            Stdio::null()
        } else {
            streams.stdin = Some(hold(&self.stdin)?);
            open_file(&self.stdin, OFlags::RDONLY)?.into()
        };
        let stdout = streams.open_output(&self.stdout)?;
        let stderr = streams.open_output(&self.stderr)?;
        Ok((Ends { stdin, stdout, stderr }, streams))
    }
}

impl Ends {
    /// Makes them the standard streams of `command`.
    pub fn give_to(self, command: &mut Command) {
        command.stdin(self.stdin).stdout(self.stdout).stderr(self.stderr);
    }
}

impl Streams {
    fn open_output(&mut self, name: &str) -> Result<Stdio> {
        if name.is_empty() {
            return Ok(Stdio::null());
        }
        if let Some(path) = name.strip_prefix("file://") {
            let file = File::options().append(true).create(true).open(path);
            return Ok(file.with_context(|| format!("open {path}"))?.into());
        }
        if let Some((kind, _)) = name.split_once("://") {
            bail!("{name}: logs go to a FIFO or to file://, not to {kind}://");
        }
        self.outputs.push(hold(name)?);
        Ok(open_file(name, OFlags::WRONLY)?.into())
    }

    /// Attaches the terminal that `console` receives to the FIFOs.
    ///
    /// # Errors
    /// None comes, or a FIFO cannot be opened.
    pub async fn attach(&mut self, names: &Names, console: Console) -> Result<()> {
        let terminal = console.receive().await?;
        if !names.stdout.is_empty() {
            let mut output = OpenOptions::new().read_write(true).open_sender(&names.stdout)?;
            let mut master = Receiver::from_owned_fd_unchecked(terminal.try_clone()?)?;
            self.outputs.push(hold(&names.stdout)?);
            // It ends with an error when the last process at the terminal has gone.
            tokio::spawn(async move { copy(&mut master, &mut output).await });
        }
        if !names.stdin.is_empty() {
            let mut input = OpenOptions::new().read_write(true).open_receiver(&names.stdin)?;
            let mut master = Sender::from_owned_fd_unchecked(terminal.try_clone()?)?;
            tokio::spawn(async move { copy(&mut input, &mut master).await });
        }
        self.terminal = Some(terminal);
        Ok(())
    }

    /// Lets the process see the end of its input, once containerd has closed it too.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sets the size of the terminal, in characters. Without a terminal nothing happens.
    ///
    /// # Errors
    /// The terminal has gone.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        if let Some(terminal) = &self.terminal {
            let size = Winsize { ws_col: width, ws_row: height, ws_xpixel: 0, ws_ypixel: 0 };
            tcsetwinsize(terminal, size).context("resize the terminal")?;
        }
        Ok(())
    }

    /// Of a process that has ended: takes the outputs, for [`drained`].
    pub fn end(&mut self) -> Vec<OwnedFd> {
        self.close_stdin();
        self.terminal = None;
        std::mem::take(&mut self.outputs)
    }
}

/// Holds FIFOs open until all that is in them has been read, however long that takes. Cancel safe.
pub async fn drained(outputs: Vec<OwnedFd>) {
    let mut looks = interval(DRAIN_INTERVAL);
    while outputs.iter().any(|output| ioctl_fionread(output).is_ok_and(|unread| unread > 0)) {
        looks.tick().await;
    }
}

/// Opens a FIFO at both ends, so that others can open one without waiting.
fn hold(path: &str) -> Result<OwnedFd> {
    Ok(open_file(path, OFlags::RDWR | OFlags::NONBLOCK)?.into())
}

fn open_file(path: &str, flags: OFlags) -> Result<File> {
    let file = open(path, flags | OFlags::CLOEXEC, Mode::empty()).with_context(|| format!("open {path}"))?;
    Ok(file.into())
}

/// Where the OCI runtime sends a process's terminal.
#[derive(Debug)]
pub struct Console {
    folder: TempDir,
    listener: UnixListener,
}

impl Console {
    /// Listens, at a path that is short enough for a socket.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open() -> Result<Self> {
        let folder = TempDir::with_prefix_in("mailroom-console-", "/run").context("make a folder in /run")?;
        let listener = UnixListener::bind(folder.path().join("socket")).context("listen for the terminal")?;
        Ok(Self { folder, listener })
    }

    /// The socket.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    async fn receive(self) -> Result<OwnedFd> {
        let come = timeout(TERMINAL_TIMEOUT, self.listener.accept()).await;
        let (stream, _) = come.context("the OCI runtime sent no terminal")?.context("receive the terminal")?;
        let received = timeout(TERMINAL_TIMEOUT, async {
            loop {
                stream.readable().await?;
                match stream.try_io(tokio::io::Interest::READABLE, || receive_descriptor(&stream)) {
                    Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => {}
                    received => return received,
                }
            }
        });
        let terminal = received.await.context("the OCI runtime sent no terminal")?.context("receive the terminal")?;
        rustix::io::ioctl_fionbio(&terminal, true).context("set up the terminal")?;
        Ok(terminal)
    }
}

fn receive_descriptor(stream: &tokio::net::UnixStream) -> std::io::Result<OwnedFd> {
    let mut name = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(stream, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let first = descriptors.flatten().next();
    first.ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "a message without a terminal"))
}
