//! Looking: pulse, console, what exists.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kmp::stand_in::{Control, ControlError, State as Word};

use super::{Inner, console, find};
use crate::{ConsoleLog, CpuPulse, ExistingInstance, InstanceId, KernelState, PlatformError, PulseSample};

/// Looks at a control file that is being written before it counts as damaged.
const LOOKS: usize = 4;

/// Read a control file, in one read unless it is just being written.
pub fn read_control(file: &File) -> Result<Control, ControlError> {
    // One byte more than it can have: a longer file shows.
    let mut buf = [0; Control::MAX_LEN + 1];
    let mut last = Err(ControlError::Torn);
    for _ in 0..LOOKS {
        let n =
            file.read_at(&mut buf, 0).map_err(|e| ControlError::Bad(format!("it cannot be read: {e}")))?;
        last = Control::decode(&buf[..n]);
        if last != Err(ControlError::Torn) {
            break;
        }
    }
    last
}

pub fn pulse(inner: &Inner, id: InstanceId, incarnation: u64) -> Result<PulseSample, PlatformError> {
    let (control, cpus, ended) = {
        let mut state = inner.state();
        let live = state.current(id, incarnation)?;
        (live.control.clone(), live.cpus.len(), live.ended.clone())
    };
    let wrong = |why: String| {
        let path = inner.folder.instance(id).join(kmp::stand_in::names::CONTROL);
        PlatformError::os(format!("read the pulse of instance {id} in {}", path.display()), why)
    };
    let read = match &control {
        Some(control) => read_control(control),
        None => Err(ControlError::Empty),
    };
    let control = match read {
        Ok(control) => control,
        // It ended before it wrote anything, or in the middle of it.
        Err(ControlError::Empty | ControlError::Torn) if ended.is_some() => {
            return Ok(PulseSample { state: parked(ended), nonce: 0, cpus: vec![] });
        }
        Err(ControlError::Empty) => {
            return Ok(PulseSample { state: KernelState::Absent, nonce: 0, cpus: vec![] });
        }
        Err(e) => return Err(wrong(e.to_string())),
    };
    if control.instance != id.0 || control.incarnation != incarnation {
        return Err(wrong(format!(
            "it is of instance {}, incarnation {}, where {id} and {incarnation} belong",
            control.instance, control.incarnation
        )));
    }
    // One that was given more CPUs begins to beat on them when it has been told.
    if control.beats.len() > cpus {
        return Err(wrong(format!("it has {} CPUs and the instance has {cpus}", control.beats.len())));
    }
    let state = match control.state {
        Word::Panicked => KernelState::Panicked(control.text),
        Word::Parked => KernelState::Parked(control.text),
        Word::Ready if ended.is_some() => parked(ended),
        Word::Ready => KernelState::Ready,
    };
    let cpus = control
        .beats
        .iter()
        .enumerate()
        .map(|(n, count)| CpuPulse { number: n as u32, count: *count })
        .collect();
    Ok(PulseSample { state, nonce: control.nonce, cpus })
}

fn parked(ended: Option<String>) -> KernelState {
    KernelState::Parked(ended.unwrap_or_default())
}

pub fn existing(inner: &Inner) -> Result<Vec<ExistingInstance>, PlatformError> {
    let all: Vec<(InstanceId, u64, crate::MemoryRange, Vec<u32>)> = {
        let state = inner.state();
        state.live.iter().map(|(id, l)| (*id, l.incarnation, l.region, l.cpus.clone())).collect()
    };
    let mut found: Vec<ExistingInstance> = all
        .into_iter()
        .map(|(id, incarnation, region, cpus)| {
            let dir = inner.folder.instance(id);
            let gone = find::all_gone(&dir)
                .map_err(|e| PlatformError::os(format!("look at the lock in {}", dir.display()), e))?;
            Ok(ExistingInstance { id, incarnation, region, cpus, running: !gone })
        })
        .collect::<Result<_, PlatformError>>()?;
    found.sort_by_key(|e| e.id);
    Ok(found)
}

/// The log, from its file while the instance has one, else the copy kept of its last life.
pub fn console(inner: &Inner, id: InstanceId, from_seq: u64) -> Result<ConsoleLog, PlatformError> {
    let ended = {
        let state = inner.state();
        match state.live.get(&id) {
            Some(live) => live.ended.is_some(),
            None => {
                let mut log = state.last_log.get(&id).cloned().ok_or(PlatformError::Unknown(id))?;
                log.records.retain(|r| r.seq >= from_seq);
                log.note = Some("kept from the last life".into());
                return Ok(log);
            }
        }
    };
    let dir = inner.folder.instance(id);
    match console::read(&dir, from_seq, ended) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(ConsoleLog {
            next_seq: from_seq,
            note: Some("there is no log".into()),
            ..ConsoleLog::default()
        }),
        log => log.map_err(|e| PlatformError::os(format!("read the log in {}", dir.display()), e)),
    }
}
