//! PyTorch and other peers, which `benches/peers/peers.py` runs in a process of its own: asked case by case, so that
//! what is compared runs on the same device right after one another.

use crate::common::case::{Case, Pass};
use crate::common::machine::Freed;
use crate::series::{Measured, Times};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

pub struct Peers {
    child: Child,
    requests: Option<ChildStdin>,
    answers: Receiver<String>,
    pub versions: String,
    /// What is there, and what is not, with the reason.
    pub names: Vec<String>,
    pub problems: Vec<String>,
    left: Duration,
}

/// What the peers run on.
pub struct Kind {
    pub cuda: bool,
    pub threads: usize,
    pub freed: Freed,
}

/// What importing everything may take, and what compiling a function may take beyond its measurement.
const IMPORTS: Duration = Duration::from_secs(120);
const COMPILATION: Duration = Duration::from_secs(90);
/// With less than this left, nothing is compiled any more.
const WORTH_COMPILING: Duration = Duration::from_secs(40);
const COMPILED: &str = "torch.compile";

impl Peers {
    /// `command` runs a Python script, "python3" for example. The peers may take `budget` in all.
    pub fn start(command: &str, kind: Kind, budget: Duration) -> Result<Self> {
        let Kind { cuda, threads, freed } = kind;
        let started = Instant::now();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/peers.py");
        let mut words = command.split_whitespace();
        let program = words.next().context("--peers: expected a command that runs Python, such as python3")?;
        let mut child = Command::new(program)
            .args(words)
            .arg(script)
            .args(["--device", if cuda { "cuda" } else { "cpu" }, "--threads", &threads.to_string()])
            .args((freed == Freed::Returned).then_some("--fresh-memory"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("--peers: {program} does not start"))?;
        let (requests, output) = (child.stdin.take(), child.stdout.take().context("no output of the peers")?);
        let (send, answers) = channel();
        std::thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let mut peers =
            Peers { child, requests, answers, versions: String::new(), names: vec![], problems: vec![], left: budget };
        let greeting = peers.answer(IMPORTS)?;
        peers.versions = greeting["versions"].as_str().unwrap_or_default().to_string();
        peers.names = texts(&greeting["implementations"]);
        peers.problems = texts(&greeting["problems"]);
        peers.left = peers.left.saturating_sub(started.elapsed());
        Ok(peers)
    }

    fn answer(&mut self, patience: Duration) -> Result<Value> {
        match self.answers.recv_timeout(patience) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("the peers said: {line}")),
            Err(RecvTimeoutError::Timeout) => {
                self.stop();
                bail!("the peers did not answer within {} s and were ended", patience.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.stop();
                bail!("the peers' process has ended")
            }
        }
    }

    fn stop(&mut self) {
        self.requests = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// A case's peers, in what is left of their time, of which `of` requests are still to come. None once there is
    /// nobody to ask or no time.
    pub fn measure(&mut self, case: &Case, pass: Pass, of: usize) -> Result<Option<Vec<Measured>>> {
        if self.left < Duration::from_secs(2) || self.names.is_empty() {
            return Ok(None);
        }
        let Some(requests) = &mut self.requests else { return Ok(None) };
        let started = Instant::now();
        let seconds = (self.left.as_secs_f64() / of.max(1) as f64).min(20.0);
        let without: &[&str] = if self.left < WORTH_COMPILING { &[COMPILED] } else { &[] };
        let (layout, shape) = case.shape.layout();
        let request = json!({
            "loss": case.loss.name(), "dtype": case.dtype.as_str(), "layout": layout, "shape": shape,
            "pass": pass.name(), "seconds": seconds, "without": without,
        });
        writeln!(requests, "{request}")?;
        let answer = self.answer(COMPILATION + Duration::from_secs_f64(2.0 * seconds));
        self.left = self.left.saturating_sub(started.elapsed());
        let answer = answer?;
        self.problems.extend(texts(&answer["problems"]));
        let results = answer["results"].as_array().ok_or_else(|| anyhow!("the peers answered {answer}"))?;
        results.iter().map(|result| measured(result, pass)).collect::<Result<Vec<_>>>().map(Some)
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // the end of its input is the end of a child that works
        self.requests = None;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.stop();
    }
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_string).collect()
}

fn measured(result: &Value, pass: Pass) -> Result<Measured> {
    let text = |key: &str| result[key].as_str().with_context(|| format!("no {key} in {result}"));
    let us: Vec<f64> = result["us"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    let [p20, p50, p80] = us[..] else { bail!("no three quantiles in {result}") };
    Ok(Measured {
        implementation: text("implementation")?.to_string(),
        pass,
        times: Ok(Times { p20, p50, p80 }),
        peak_bytes: result["peak_bytes"].as_u64().map(|bytes| bytes as usize),
        method: format!("{} {}x{}", text("clock")?, result["samples"], result["calls"]),
        sm_mhz: result["sm_mhz"].as_u64().map(|mhz| mhz as u32),
    })
}
