//! A guest's standard output and standard error: kept up to a bound, then swallowed, and logged when it is done.

use crate::cli::counted;
use bytes::Bytes;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

/// Bytes of output kept for one message; the rest is counted and dropped, so that a guest that prints too much
/// loses lines and nothing else.
const MAX_BYTES: usize = 16 << 10;

/// Lines of output logged for one message. Logging takes some 3 µs a line, and the shard does nothing else meanwhile.
const MAX_LINES: usize = 200;

/// What a guest may write with one call.
const PERMIT_BYTES: usize = 4 << 10;

/// Both output streams of one instance, in the order written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Output(Arc<Mutex<Written>>);

#[derive(Debug, Default)]
struct Written {
    bytes: Vec<u8>,
    dropped: usize,
}

impl Output {
    pub fn is_empty(&self) -> bool {
        self.written().bytes.is_empty()
    }

    /// Logs each line with the message it belongs to, as the guest wrote it: the log makes it harmless where it goes
    /// to a terminal.
    pub fn log(&self, message_id: &str) {
        let written = self.written();
        let text = String::from_utf8_lossy(&written.bytes);
        let mut lines = text.lines();
        for line in lines.by_ref().take(MAX_LINES) {
            tracing::info!(target: "guest", id = message_id, "{line}");
        }
        let more = lines.count();
        if more > 0 {
            tracing::info!(target: "guest", id = message_id, "… and {} more", counted(more as u64, "line"));
        }
        if written.dropped > 0 {
            tracing::info!(target: "guest", id = message_id, "… and {} more", counted(written.dropped as u64, "byte"));
        }
    }

    fn push(&self, bytes: &[u8]) {
        let mut written = self.written();
        let kept = bytes.len().min(MAX_BYTES - written.bytes.len());
        written.bytes.extend_from_slice(&bytes[..kept]);
        written.dropped += bytes.len() - kept;
    }

    fn written(&self) -> std::sync::MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Output {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.push(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(PERMIT_BYTES)
    }
}

impl AsyncWrite for Output {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.push(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
