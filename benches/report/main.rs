//! One command that measures a machine and every loss on it, prints a table, and keeps each number in a CSV file from which
//! it draws its pictures.
//!
//!     cargo bench --bench report                                      the whole grid, bounded by --time-budget
//!     cargo bench --bench report -- --quick --out /tmp/report         a minute, to see that it runs
//!     cargo bench --features cuda --bench report -- --filter bf16     on a GPU if one works
//!
//! What is compared is measured in turns (A B A B …) in one run, after a warm-up, and so is the bandwidth that the shares
//! refer to. See `benches/peers/README.md` for the columns.

#[path = "../common/mod.rs"]
mod common;

mod bandwidth;
mod memory;
mod picture;
mod series;
mod table;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use common::case::{Case, FORWARD, GRADIENT, cases};
use common::machine::Machine;
use indicatif::{ProgressBar, ProgressStyle};
use series::Series;
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
    /// Threads of the CPU [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Draw the pictures of this CSV file again, with the peers' rows if their file lies beside it, and measure nothing
    #[arg(long)]
    draw: Option<PathBuf>,
    /// `cargo bench` says so
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let mut options = Options::parse();
    if let Some(csv) = &options.draw {
        return draw(csv);
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
    if let Some(threads) = options.threads {
        // SAFETY: nothing else runs yet; rayon and candle read it on first use
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
    let machine = match options.device {
        On::Cpu => Machine::cpu(),
        On::Best | On::Cuda => Machine::best(options.rehearse)?,
    };
    if options.device == On::Cuda && !machine.device.is_cuda() {
        bail!("no CUDA device works, or this is a build without the cuda feature");
    }
    measure(&options, &machine, &out)
}

fn measure(options: &Options, machine: &Machine, out: &Path) -> Result<()> {
    let started = Instant::now();
    let environment = Environment::new(machine);
    let mut table = Table::create(out, environment)?;
    eprintln!("{}, {} threads, to {}", machine.name, rayon::current_num_threads(), table.path().display());

    let hurry = options.quick || options.rehearse;
    let copy = bandwidth::measure(machine, hurry)?;
    table.bandwidth("copy", &copy.copy)?;
    table.bandwidth("read", &copy.read)?;
    println!("copy {:.1} GB/s, read {:.1} GB/s", copy.copy.rate(), copy.read.rate());
    table.share_of(copy.copy.rate());

    let recorder = machine.recorder(options.rehearse);
    if let (true, Err(why)) = (machine.device.is_cuda(), &recorder) {
        println!("no graph replays: {why}");
    }
    let mut cases = cases(machine.device.is_cuda(), options.quick);
    if options.rehearse {
        let shrunk: Vec<Case> = cases.into_iter().map(Case::shrunk).collect();
        cases = (0..shrunk.len()).filter(|&i| !shrunk[..i].contains(&shrunk[i])).map(|i| shrunk[i]).collect();
    }
    let names: Vec<String> = cases.iter().map(|case| case.to_string()).collect();
    // a case's whole name means that case alone
    let wanted = |name: &str| {
        let matches = |f: &String| if names.contains(f) { name == f } else { name.contains(f.as_str()) };
        options.filter.is_empty() || options.filter.iter().any(matches)
    };
    cases.retain(|case| wanted(&case.to_string()));
    let bar = ProgressBar::new(2 * cases.len() as u64);
    bar.set_style(ProgressStyle::with_template("{elapsed_precise} [{wide_bar}] {pos}/{len} {msg}")?);
    println!("{}", table::HEADING);
    let budget = Duration::from_secs(options.time_budget);
    let mut left_out = vec![];
    for (i, &case) in cases.iter().enumerate() {
        bar.set_message(case.to_string());
        // what is left, evenly over the two series of each case that is left
        let left = budget.saturating_sub(started.elapsed());
        let each = (left / (2 * (cases.len() - i)) as u32).min(Duration::from_secs(40));
        if left < Duration::from_secs(2) {
            left_out.push(case.to_string());
            continue;
        }
        for kind in [&FORWARD[..], &GRADIENT[..]] {
            let time = if hurry { each.min(Duration::from_millis(200)) } else { each };
            let series = Series { case, kind, recorder: recorder.as_ref().ok(), time };
            match series.measure(machine) {
                Ok(results) => {
                    for line in table.results(&case, &results)? {
                        // the bar's own println is silent where there is no terminal
                        bar.suspend(|| println!("{line}"));
                    }
                }
                Err(e) => bar.suspend(|| println!("{case}: {e:#}")),
            }
            bar.inc(1);
        }
        // a run that is cut off leaves pictures too
        picture::draw_all(table.path(), &table::read(table.path())?, || {})?;
    }
    bar.finish_and_clear();
    if !left_out.is_empty() {
        println!("left out, the time budget being spent: {}", left_out.join(", "));
    }
    draw(table.path())
}

fn draw(csv: &Path) -> Result<()> {
    let mut rows = table::read(csv).with_context(|| csv.display().to_string())?;
    let peers = csv.with_extension("peers.csv");
    if peers.exists() {
        rows.extend(table::read(&peers).with_context(|| peers.display().to_string())?);
    }
    let bar = ProgressBar::new(3);
    for path in picture::draw_all(csv, &rows, || bar.inc(1))? {
        bar.suspend(|| println!("drawn: {}", path.display()));
    }
    bar.finish_and_clear();
    Ok(())
}
