//! One command that measures a machine and every loss on it, prints a table, and keeps each number in a CSV file from
//! which it draws its pictures.
//!
//!     cargo bench --bench report                                      the whole grid, bounded by --time-budget
//!     cargo bench --bench report -- --peers python3                   and PyTorch on each case, right after it
//!     cargo bench --bench report -- --quick --out /tmp/report         a minute, to see that it runs
//!     cargo bench --features cuda --bench report -- --filter bf16     on a GPU if one works
//!
//! What is compared is measured in turns (A B A B …) in one run, after a warm-up, and so are the rates that the shares
//! refer to. See `benches/README.md` for the columns.

#[path = "../common/mod.rs"]
mod common;

mod driver;
mod first;
mod goals;
mod memory;
mod peers;
mod picture;
mod rates;
mod series;
mod table;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use common::case::{Case, FORWARD, GRADIENT, HOST, Implementation, Loss, Pass, SMALL, cases};
use common::machine::{Freed, Machine};
use common::work::Inputs;
use driver::Driver;
use indicatif::{ProgressBar, ProgressStyle};
use peers::Peers;
use series::{Measured, Series};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use table::{Environment, Table};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum On {
    /// CUDA where a device works and this is a build for it
    Best,
    Cpu,
    Cuda,
}

#[derive(Parser)]
#[command(about = "Measures every loss against candle's, and against the machine's bandwidth")]
struct Options {
    /// A few small cases only
    #[arg(long)]
    quick: bool,
    /// Every case, shrunk to a few rows: to see that all of it runs, on a machine where nothing is fast. The times are
    /// the host's and mean nothing
    #[arg(long)]
    rehearse: bool,
    /// Only cases whose loss/dtype/shape contains one of these, separated by commas
    #[arg(long, value_delimiter = ',')]
    filter: Vec<String>,
    /// Where the CSV and the pictures go [default: benches/results]
    #[arg(long)]
    out: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "best")]
    device: On,
    /// Seconds; what matters most comes first, and what does not fit is left out
    #[arg(long, default_value_t = 1800)]
    time_budget: u64,
    /// On the CPU, let the system have large blocks that are freed, as it does by default, and map them anew for the
    /// next call; the peers too. The rows go to a file of their own
    #[arg(long)]
    fresh_memory: bool,
    /// Threads of the CPU [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Measure the peers too: the command that runs a Python script, "python3" for example
    #[arg(long)]
    peers: Option<String>,
    /// The peers' part of the time budget
    #[arg(long, default_value_t = 0.4)]
    peers_share: f64,
    /// Draw the pictures of this CSV file again, and measure nothing
    #[arg(long)]
    draw: Option<PathBuf>,
    /// Hold this CSV file against the goals for a GPU, and measure nothing
    #[arg(long)]
    goals: Option<PathBuf>,
    /// Run a few calls of the cases that --filter leaves, for a profiler, and measure nothing
    #[arg(long)]
    profile: bool,
    /// Be the process whose first call is timed
    #[arg(long, hide = true)]
    first_call: Option<String>,
    /// `cargo bench` says so
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let mut options = Options::parse();
    if let Some(csv) = &options.draw {
        return draw(csv);
    }
    if let Some(csv) = &options.goals {
        let rows = table::read(csv).with_context(|| csv.display().to_string())?;
        goals::table(&rows, options.rehearse).iter().for_each(|line| println!("{line}"));
        return Ok(());
    }
    let (results, elsewhere) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results"), std::env::temp_dir());
    let mut out = options.out.clone().unwrap_or(results);
    if !options.bench && std::env::args().len() == 1 {
        // `cargo test --all-targets` starts a bench without arguments
        (options.quick, out) = (true, elsewhere.join("candle-fused-loss-report"));
    }
    if options.rehearse && options.out.is_none() {
        out = elsewhere.join("candle-fused-loss-rehearsal");
    }
    let set = ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"].into_iter().find(|name| std::env::var_os(name).is_some());
    if let (true, Some(name)) = (options.fresh_memory, set) {
        bail!("--fresh-memory, but {name} in the environment has told the allocator what to do with free memory");
    }
    if let Some(threads) = options.threads {
        // SAFETY: nothing else runs yet; rayon and candle read it on first use
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
    let machine = match options.device {
        On::Cpu => Machine::cpu(options.freed())?,
        On::Best | On::Cuda => Machine::best(options.freed(), options.rehearse)?,
    };
    if options.device == On::Cuda && !machine.device.is_cuda() {
        bail!("no CUDA device works, or this is a build without the cuda feature");
    }
    if let Some(what) = &options.first_call {
        return first::call(what, &machine.device);
    }
    if options.profile {
        return options.cases(&machine).into_iter().try_for_each(|case| profile(case, &machine));
    }
    Report::new(&options, &machine, &out)?.run()
}

impl Options {
    /// Whether no number of the run is to be believed.
    fn hurry(&self) -> bool {
        self.quick || self.rehearse
    }

    fn freed(&self) -> Freed {
        if self.fresh_memory { Freed::Returned } else { Freed::Kept }
    }

    /// The cases to measure.
    fn cases(&self, machine: &Machine) -> Vec<Case> {
        let mut cases = cases(machine.device.is_cuda(), self.quick);
        if self.rehearse {
            let shrunk: Vec<Case> = cases.into_iter().map(Case::shrunk).collect();
            cases = (0..shrunk.len()).filter(|&i| !shrunk[..i].contains(&shrunk[i])).map(|i| shrunk[i]).collect();
        }
        let names: Vec<String> = cases.iter().map(|case| case.to_string()).collect();
        // a case's whole name means that case alone
        let wanted = |name: &str| {
            let matches = |f: &String| if names.contains(f) { name == f } else { name.contains(f.as_str()) };
            self.filter.is_empty() || self.filter.iter().any(matches)
        };
        cases.retain(|case| wanted(&case.to_string()));
        cases
    }
}

/// What a profiler is to see of a case: a few calls of each of this crate's passes.
fn profile(case: Case, machine: &Machine) -> Result<()> {
    let inputs = Inputs::new(case, machine)?;
    for pass in [Pass::Forward, Pass::LossAndGrad, Pass::ForwardBackward] {
        if case.exists(Implementation::Fused, pass, machine.device.is_cuda()) {
            (0..2).try_for_each(|i| inputs.call(Implementation::Fused, pass, i))?;
            machine.device.synchronize()?;
        }
    }
    Ok(())
}

/// A run of the bench.
struct Report<'a> {
    options: &'a Options,
    machine: &'a Machine,
    driver: Option<Driver>,
    /// Where graphs can be recorded.
    recorder: Option<Machine>,
    peers: Option<Peers>,
    table: Table,
    bar: ProgressBar,
    /// What has no time, and why.
    failures: Vec<String>,
}

impl<'a> Report<'a> {
    fn new(options: &'a Options, machine: &'a Machine, out: &Path) -> Result<Self> {
        let is_cuda = machine.device.is_cuda();
        let driver = is_cuda.then(|| Driver::of(&machine.name)).transpose().unwrap_or_else(|why| {
            println!("no clocks: {why}");
            None
        });
        let mut table = Table::create(out, Environment::new(machine, driver.as_ref()))?;
        let threads = rayon::current_num_threads();
        println!("{}, {threads} threads, to {}", machine.name, table.path().display());

        let rates = rates::measure(machine, options.hurry())?;
        print!("copy {:.1} GB/s, read {:.1} GB/s", rates.copy.rate(), rates.read.rate());
        println!(
            "{}",
            rates.matmul.as_ref().map_or(String::new(), |r| format!(", product {:.1} TFLOP/s", r.rate() / 1e3))
        );
        table.rates(rates, driver.as_ref().and_then(Driver::sm_mhz))?;

        let recorder = match is_cuda.then(|| machine.recorder(options.rehearse)).transpose() {
            Ok(recorder) => recorder,
            Err(why) => {
                println!("no graph replays: {why}");
                None
            }
        };
        let budget = Duration::from_secs_f64(options.time_budget as f64 * options.peers_share);
        let start = |command: &String| {
            let kind = peers::Kind { cuda: is_cuda && !options.rehearse, threads, freed: machine.freed };
            Peers::start(command, kind, budget)
        };
        let peers = options.peers.as_ref().map(start).transpose()?;
        if let Some(peers) = &peers {
            println!("peers: {} ({})", peers.names.join(", "), peers.versions);
            peers.problems.iter().for_each(|problem| println!("not there: {problem}"));
        }
        let bar = ProgressBar::hidden();
        Ok(Report { options, machine, driver, recorder, peers, table, bar, failures: vec![] })
    }

    fn run(mut self) -> Result<()> {
        let cases = self.options.cases(self.machine);
        self.bar = ProgressBar::new(2 * cases.len() as u64);
        self.bar.set_style(ProgressStyle::with_template("{elapsed_precise} [{wide_bar}] {pos}/{len} {msg}")?);
        if self.machine.device.is_cuda() {
            self.first_calls()?;
        }
        println!("{}", table::HEADING);
        let share = if self.peers.is_some() { 1.0 - self.options.peers_share } else { 1.0 };
        let mut left = Duration::from_secs_f64(self.options.time_budget as f64 * share);
        let mut left_out = vec![];
        for (i, &case) in cases.iter().enumerate() {
            self.bar.set_message(case.to_string());
            if left < Duration::from_secs(2) {
                left_out.push(case.to_string());
                continue;
            }
            let started = Instant::now();
            // what is left, evenly over the series of each case that is left
            self.ours(case, (left / (2 * (cases.len() - i)) as u32).min(Duration::from_secs(40)))?;
            left = left.saturating_sub(started.elapsed());
            self.theirs(case, cases.len() - i)?;
            // a run that is cut off leaves pictures too
            picture::draw_all(self.table.path(), &table::read(self.table.path())?, || {})?;
        }
        self.bar.finish_and_clear();
        if !left_out.is_empty() {
            println!("left out, the time budget being spent: {}", left_out.join(", "));
        }
        if let Some(peers) = &self.peers {
            peers.problems.iter().for_each(|problem| println!("not measured: {problem}"));
        }
        draw(self.table.path())?;
        match self.failures.as_slice() {
            // a rehearsal is there to find them; elsewhere memory may not suffice for every implementation
            [_, ..] if self.options.rehearse => bail!("failed: {}", self.failures.join("; ")),
            _ => Ok(()),
        }
    }

    fn first_calls(&mut self) -> Result<()> {
        for (implementation, what) in [("candle", first::OPERATION), ("fused", first::LOSS)] {
            match first::measure(what) {
                Ok(us) => {
                    println!("first call of a process, {implementation}'s {what}: {:.2} s", us / 1e6);
                    self.table.first_call(implementation, what, us)?;
                }
                Err(e) => self.fail(format!("the first call of a process: {e:#}")),
            }
        }
        Ok(())
    }

    /// Whether it is the case whose calls are timed on the host.
    fn asks_the_host(&self, case: Case) -> bool {
        let small = if self.options.rehearse { SMALL.shrunk() } else { SMALL };
        self.machine.device.is_cuda() && case == small
    }

    /// This crate, candle and the composed path on a case.
    fn ours(&mut self, case: Case, each: Duration) -> Result<()> {
        let time = if self.options.hurry() { each.min(Duration::from_millis(200)) } else { each };
        let host = self.asks_the_host(case);
        for (kind, wanted) in [(&FORWARD[..], true), (&GRADIENT[..], true), (&HOST[..], host)] {
            if !wanted {
                continue;
            }
            let (recorder, driver) = (self.recorder.as_ref(), self.driver.as_ref());
            let series = Series { case, kind, recorder, driver, time };
            match series.measure(self.machine) {
                Ok(results) => self.keep(case, &results, None)?,
                Err(e) => self.fail(format!("{case}: {e:#}")),
            }
            self.bar.inc(1);
        }
        // the peers' processes need the memory
        self.machine.release().map_err(Into::into)
    }

    /// The peers on a case, one of so many that are left.
    fn theirs(&mut self, case: Case, cases_left: usize) -> Result<()> {
        let probabilities = case.loss == Loss::CrossEntropyProbabilities;
        let backward =
            probabilities || matches!(case.loss, Loss::CrossEntropy | Loss::CrossEntropySoftcap | Loss::LogSoftmax);
        let passes = [
            (Pass::Forward, true),
            (Pass::ForwardBackward, true),
            (Pass::Backward, backward),
            (Pass::TargetGradient, probabilities),
            (Pass::HostCall, self.asks_the_host(case)),
        ];
        for (i, (pass, _)) in passes.into_iter().filter(|(_, wanted)| *wanted).enumerate() {
            let Some(peers) = &mut self.peers else { return Ok(()) };
            let versions = peers.versions.clone();
            match peers.measure(&case, pass, (3 * cases_left).saturating_sub(i)) {
                Ok(Some(results)) => self.keep(case, &results, Some(&versions))?,
                Ok(None) => {}
                Err(e) => self.fail(format!("{case}: {e:#}")),
            }
        }
        Ok(())
    }

    fn fail(&mut self, what: String) {
        self.bar.suspend(|| println!("{what}"));
        self.failures.push(what);
    }

    fn keep(&mut self, case: Case, results: &[Measured], versions: Option<&str>) -> Result<()> {
        let failed = results.iter().filter_map(|r| Some((r, r.times.as_ref().err()?)));
        self.failures.extend(failed.map(|(r, e)| format!("{case} {} {}: {e}", r.implementation, r.pass.name())));
        for line in self.table.results(&case, results, versions)? {
            // the bar's own println is silent where there is no terminal
            self.bar.suspend(|| println!("{line}"));
        }
        Ok(())
    }
}

fn draw(csv: &Path) -> Result<()> {
    let rows = table::read(csv).with_context(|| csv.display().to_string())?;
    let bar = ProgressBar::new(3);
    for path in picture::draw_all(csv, &rows, || bar.inc(1))? {
        bar.suspend(|| println!("drawn: {}", path.display()));
    }
    bar.finish_and_clear();
    Ok(())
}
