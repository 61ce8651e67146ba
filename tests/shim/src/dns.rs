//! A name server for pods that knows one name.

use anyhow::{Context as _, Result};
use std::net::Ipv4Addr;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

/// Answers on port 53 of an address of the test's own, until it is dropped.
#[derive(Debug)]
pub struct NameServer {
    task: JoinHandle<()>,
}

/// Longer questions than this are of no resolver; RFC 1035 has no longer ones over UDP.
const QUESTION_BYTES_MAX: usize = 512;

/// Offsets and values of RFC 1035, section 4.1.
const HEADER_BYTES: usize = 12;
const TYPE_A: [u8; 2] = [0, 1];
const RESPONSE: u8 = 0x84;
const NO_ERROR: u8 = 0;
const NO_SUCH_NAME: u8 = 3;

impl NameServer {
    /// Knows that `name` is at `address`, and that there is no other.
    ///
    /// # Errors
    /// When someone else answers there already.
    pub async fn start(listen: Ipv4Addr, name: &str, address: Ipv4Addr) -> Result<Self> {
        let socket = UdpSocket::bind((listen, 53)).await.with_context(|| format!("listen at {listen}:53"))?;
        let name = name.to_owned();
        let task = tokio::spawn(async move {
            let mut question = [0; QUESTION_BYTES_MAX];
            while let Ok((length, sender)) = socket.recv_from(&mut question).await {
                if let Some(answer) = answer(&question[..length], &name, address) {
                    // A resolver that has gone does not need it.
                    _ = socket.send_to(&answer, sender).await;
                }
            }
        });
        Ok(Self { task })
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The answer to a question about one name; `None` when it is no question.
fn answer(question: &[u8], name: &str, address: Ipv4Addr) -> Option<Vec<u8>> {
    let mut labels = Vec::new();
    let mut at = HEADER_BYTES;
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(question.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let kind = question.get(at..at + 2)?;
    let asked = question.get(HEADER_BYTES..at + 4)?;
    let known = labels.join(".") == name;
    let answers = u8::from(known && kind == TYPE_A);
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([RESPONSE, if known { NO_ERROR } else { NO_SUCH_NAME }, 0, 1, 0, answers, 0, 0, 0, 0]);
    answer.extend(asked);
    if answers == 1 {
        // The name of the question, class IN, one second to live, four bytes.
        answer.extend([0xc0, HEADER_BYTES as u8, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
